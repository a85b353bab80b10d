"""Run folders as the verbs use them: start or resume one, find the model in one."""

import os
from pathlib import Path

import torch

from fewstep.data.images import ImageSet
from fewstep.data.latents import LatentSet
from fewstep.errors import UserError
from fewstep.files import folder_lock, write_text
from fewstep.models.image_model import Asked
from fewstep.recipes.loading import differences, dump, read_run_recipe
from fewstep.recipes.schema import AnyRecipe
from fewstep.runtime.checkpoint import RECIPE, check_run
from fewstep.runtime.tracking import Report, progress_bar
from fewstep.training.batches import BatchAt
from fewstep.training.loop import Evaluate, train
from fewstep.training.method import Method


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


def tell_found(images: ImageSet | LatentSet | None) -> None:
    """Prints what was found in files and what is done with it."""
    if images and images.found:
        print(images.found)


def start_run(
    method: Method,
    batch_at: BatchAt,
    evaluate: Evaluate | None,
    run: Path,
    recipe: AnyRecipe,
    report: Report | None,
    asked: Asked = None,
) -> None:
    """Makes the run folder and trains on `batch_at`; `report` replaces the progress bar, `asked` is for grids.

    Raises UserError if another process trains there, or has meanwhile begun another recipe's run.
    """
    with folder_lock(run), progress_bar(run.name, recipe.num_steps, report) as show:
        check_target(run, recipe, resume=True)
        if not (run / RECIPE).exists():
            write_text(run / RECIPE, dump(recipe))
        train(method, batch_at, run, recipe, show, evaluate, asked)
