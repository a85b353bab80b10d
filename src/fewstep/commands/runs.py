"""What the verbs share: devices, folders that can be written to, and runs, which are started, resumed or finished."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fewstep.data.images import ImageSet
from fewstep.data.latents import LatentSet
from fewstep.data.prompts import load_prompts
from fewstep.embedded.sources import origin
from fewstep.errors import Interrupted, UserError
from fewstep.files import folder_lock, write_text
from fewstep.models.image_model import Asked
from fewstep.recipes.loading import differences, dump, load_recipe, read_run_recipe, recipe_names
from fewstep.recipes.schema import AnyRecipe
from fewstep.runtime.checkpoint import RECIPE, check_run, checkpoint_steps
from fewstep.runtime.tracking import Report, progress_bar
from fewstep.training.batches import BatchAt
from fewstep.training.loop import Evaluate, train
from fewstep.training.method import Method


class Job(NamedTuple):
    """What is trained, on which batch at a step, how it is judged on the way, and what its grids show."""

    method: Method
    batch_at: BatchAt
    evaluate: Evaluate | None = None
    asked: Asked = None


Jobs = dict[str, Callable[[Any, Path], Job]]
"""By the kind of a recipe: from it and the folder of its run to what is to be done."""


def pick_device(device: str) -> torch.device:
    """The device of that name; raises UserError if it is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r}: write auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: no CUDA GPU here; use device=cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def check_target(run: Path, recipe: AnyRecipe, resume: bool) -> None:
    """Raises UserError if the recipe can't start in the folder `run`, or continue there; writes nothing.

    With `resume` a folder that is not there or empty will do, so that one command starts and continues a run. What a
    kill before the first line left, a lock or half a file, hides behind a dot and counts as nothing.
    """
    check_writable(run)
    occupied = any(not path.name.startswith(".") for path in run.iterdir()) if run.is_dir() else False
    if occupied and resume:
        check_run(run)
        changed = differences(read_run_recipe(run / RECIPE), recipe)
        if changed:
            raise UserError(
                f"{run}: --resume with a changed recipe ({'; '.join(changed)}); undo that, or choose another --out"
            )
    elif occupied:
        raise UserError(f"{run}: exists already; continue it with --resume, or choose another --out")


def check_writable(folder: Path) -> None:
    """Raises UserError if nothing could be written in `folder`, there or not yet; writes nothing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--out: {nearest} is not a folder that can be written to; choose another")


def tell_done(wrote: str, *next_commands: str) -> None:
    """Prints what a verb wrote, and the command lines that come next, with or without the program's name."""
    print(f"wrote {wrote}")
    for command in next_commands:
        print(f"next: fewstep {command.removeprefix('fewstep ')}")


def tell_found(images: ImageSet | LatentSet | None) -> None:
    """Prints what was found in files and what is done with it."""
    if images and images.found:
        print(images.found)


def train_recipe(jobs: Jobs, recipe: AnyRecipe, run: Path, resume: bool, report: Report | None = None) -> None:
    """Runs the recipe into the folder `run`; whatever is wrong with recipe, data or folder is told before any of it."""
    check_target(run, recipe, resume)
    shown = load_prompts(recipe.samples.prompts, field="samples.prompts:") if recipe.samples.prompts else None
    job = jobs[recipe.kind](recipe, run)
    if shown and getattr(job.method.model, "kind", None) != "text":
        raise UserError("samples.prompts: the model takes no text; leave it out")
    start_run(job._replace(asked=shown) if shown else job, run, recipe, report)


def start_run(job: Job, run: Path, recipe: AnyRecipe, report: Report | None) -> None:
    """Makes the run folder and trains in it; `report` replaces the progress bar.

    Raises UserError if another process trains there, or has meanwhile begun another recipe's run.
    """
    with folder_lock(run), progress_bar(run.name, recipe.num_steps, report) as show:
        check_target(run, recipe, resume=True)
        if not (run / RECIPE).exists():
            write_text(run / RECIPE, dump(recipe))
        train(job.method, job.batch_at, run, recipe, show, job.evaluate, job.asked)


def check_source(recipe: AnyRecipe, field: str, name: str, runs: Path) -> None:
    """Raises UserError if the user gave images but not the `field`, whose recipe `name` is trained on others."""
    source = recipe.data.source
    if source is None or name not in recipe_names() or recipe.gives(field) or not recipe.gives("data.source"):
        return
    trained_on = _recipe_of(name, runs).data.source
    if trained_on is None or origin(trained_on) != origin(source):
        raise UserError(
            f"{field}: {name} is trained on {trained_on}, not on data.source={source}; name one that is, which "
            f"`fewstep teach` makes, or say --set {field}={name} if that is meant"
        )


def finished_run(name: str, runs: Path, field: str) -> Path:
    """The run folder at a path, or of a `teach` recipe in the folder `runs`, which is finished first if need be.

    A run that is there goes on with its own recipe, whatever overrides it was started with.
    """
    if Path(name).exists():
        return Path(name)
    if name not in recipe_names():
        raise UserError(f"{field}: {name!r} is neither a folder nor the name of a recipe, nor a file or a hub id")
    run, recipe = runs / name, _recipe_of(name, runs)
    if not recipe.kind.startswith("teach"):
        raise UserError(f"{field}: the recipe {name!r} does not train one; `fewstep recipes` lists those that do")
    if max(checkpoint_steps(run), default=0) < recipe.num_steps:
        from fewstep.commands.teach import JOBS  # which imports this

        try:
            train_recipe(JOBS, recipe, run, resume=True)
        except Interrupted as stop:
            raise Interrupted(f"stopped while teaching {name}; the same command goes on with it") from stop
    return run


def _recipe_of(name: str, runs: Path) -> AnyRecipe:
    """What the run of a recipe in the folder `runs` was made by, or would be."""
    path = runs / name / RECIPE
    return read_run_recipe(path) if path.is_file() else load_recipe(name)
