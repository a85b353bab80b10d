"""What the verbs share: devices, folders that can be written to, and runs, which are started, resumed or finished."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fewstep
from fewstep.commands.places import check_writable
from fewstep.commands.ranks import check_alike_ranks, check_ranks
from fewstep.data.images import ImageSet, content_digest
from fewstep.data.latents import LatentSet
from fewstep.data.texts import load_prompts
from fewstep.embedded.sources import origin
from fewstep.errors import Interrupted, UserError, out_of_memory
from fewstep.files import folder_lock, read_json, size, write_text
from fewstep.models.image_model import Asked, ImageModel
from fewstep.models.loading.pretrained import SUFFIX
from fewstep.networks.compiling import prepare_compiling, uncompiled
from fewstep.recipes.loading import differences, dump, load_recipe, read_run_recipe, recipe_names
from fewstep.recipes.schema import AnyRecipe
from fewstep.runtime.allocation import keep_freed_memory
from fewstep.runtime.checkpoint import EVALUATIONS, FACTS, RECIPE, check_run, checkpoint_steps
from fewstep.runtime.distributed import (
    any_of,
    environment,
    first_then_others,
    joined,
    num_ranks,
    of_first,
    place,
    rank,
    ranks_here,
)
from fewstep.runtime.tensorboard import check_tensorboard
from fewstep.runtime.tracking import Report, progress_bar, read_metrics
from fewstep.stopping import advising
from fewstep.training.batches import BatchAt
from fewstep.training.loop import Evaluate, train
from fewstep.training.method import Method
from fewstep.training.optimization import check_optimizer, learning_rate_factor
from fewstep.training.parallel import check_shard, offload
from fewstep.training.roles import compile_roles
from fewstep.training.settings import OptimizerSettings


class Job(NamedTuple):
    """What is trained, on which batch at a step, how it is judged on the way, and what its grids show."""

    method: Method
    batch_at: BatchAt
    evaluate: Evaluate | None = None
    asked: Asked = None
    teacher: str | None = None  # what tells it from others, if there is one


Jobs = dict[str, Callable[[Any, Path], Job]]
"""By the kind of a recipe: from it and the folder of its run to what is to be done."""


def pick_device(device: str) -> torch.device:
    """The device of that name; raises UserError if it is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r}: write auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: no CUDA GPU here; use device=cpu")
    return device_of_rank(torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"))


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None of the CPU, which has what the machine has."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


def place_of_rank(device: torch.device) -> tuple[int, int, torch.device]:
    """The number of this process and how many there are, as torchrun sets them, and the GPU of its own machine's."""
    return *place(), device_of_rank(device)


def device_of_rank(device: torch.device) -> torch.device:
    """The GPU of its own, where there are several processes and GPUs."""
    if device.type == "cuda":
        return torch.device("cuda", environment("LOCAL_RANK", 0) % torch.cuda.device_count())
    return device


FREE = {  # keys, or the first parts of them, that change no number of a run but by rounding
    *("description", "device", "log_every", "sample_every", "checkpoint_every", "grid_images", "max_skipped"),
    *("tensorboard", "samples", "embeddings", "accumulate", "checkpointing", "speed", "parallel"),
}


def check_target(run: Path, recipe: AnyRecipe, resume: bool) -> None:
    """Raises UserError if the recipe can't start in the folder `run`, or continue there; writes nothing.

    With `resume` a folder that is not there or empty will do, so that one command starts and continues a run. What a
    kill before the first line left, a lock or half a file, hides behind a dot and counts as nothing.
    """
    check_writable(run)
    occupied = any(not path.name.startswith(".") for path in run.iterdir()) if run.is_dir() else False
    if occupied and resume:
        check_run(run)
        check_past(run, read_run_recipe(run / RECIPE), recipe)
    elif occupied:
        raise UserError(f"{run}: exists already; continue it with --resume, or choose another --out")


def check_past(run: Path, old: AnyRecipe, new: AnyRecipe) -> None:
    """Raises UserError if the recipe, or the data that it names, would have made other numbers than the run has."""
    facts, done = read_facts(run), max(checkpoint_steps(run), default=0)
    same_data = facts.get("data") == content_digest(new.data)
    fits = {
        "data.source": same_data and facts.get("data") is not None,
        "teacher": "teacher" in facts,  # compared when it is loaded
        "num_steps": done <= new.num_steps and same_rates(old, new, done),
        "evaluation": not read_metrics(run / EVALUATIONS),  # else the best would be one of incomparable numbers
        "regression.num": True,  # how what is there was made
        "evaluation.every": True,
        "evaluation.time_share": True,
        "evaluation.keep": True,
    }
    changed = []
    for change in differences(old, new):
        key = change.partition(":")[0]
        first = key.partition(".")[0]
        if first not in FREE and not fits.get(key, fits.get(first, False)):
            changed.append(change)
    if changed:
        out = "choose another --out"
        if new.kind == "distill" and not any(change.startswith("lora") for change in changed):  # which would not fit
            out += f", with --set init_from={run} in place of --resume to start from its weights"
        raise UserError(f"{run}: --resume with a changed recipe ({'; '.join(changed)}); undo that, or {out}")
    if "data" in facts and not same_data:
        told = "has other files than the run began with"
        raise UserError(f"{run}: {new.data.source} {told}; put them back, or choose another --out")


def same_rates(old: Any, new: Any, done: int) -> bool:
    """Whether the learning rates of the steps that are done are those of a run of the new length."""

    def last_rate(num_steps: int, settings: Any, every: int) -> float:  # differs as soon as a rate has begun to fall
        return learning_rate_factor(-(-done // every) - 1, -(-num_steps // every), settings)

    trained = optimizers(old)
    return not done or all(last_rate(old.num_steps, *each) == last_rate(new.num_steps, *each) for each in trained)


def optimizers(recipe: Any) -> list[tuple[OptimizerSettings, int]]:
    """Of all that a recipe trains, each with the steps per update of it."""
    if hasattr(recipe, "optimizer"):
        return [(recipe.optimizer, 1)]
    critics = [(recipe.critic.optimizer, 1)] if hasattr(recipe, "critic") else []
    return [(recipe.student.optimizer, getattr(recipe, "student_every", 1)), *critics]


def read_facts(run: Path) -> dict[str, str | None]:
    """What a run began with; {} of one of an earlier version."""
    path = run / FACTS
    try:
        return read_json(path) if path.is_file() else {}
    except UserError as error:
        raise UserError(f"{path}: can't be read; remove it, and the run goes on without its checks") from error


def check_file(out: Path, overwrite: bool) -> None:
    """Raises UserError if `out` can't be a new single file of weights."""
    if out.suffix != SUFFIX:
        raise UserError(f"{out}: a single file's name ends in {SUFFIX}")
    if out.exists() and (out.is_dir() or not overwrite):
        raise UserError(f"{out}: exists already; replace a file with --overwrite, or choose another place")


def check_alike(sources: Sequence[str], models: Sequence[ImageModel]) -> None:
    """Raises UserError unless all models make the images of the first, of its classes or from text."""

    def made(model: ImageModel) -> list[str]:
        of_what = f"of {model.num_classes} classes" if model.kind == "label" else "from text"
        names = [f"{name!r} of class {number}" for number, name in enumerate(model.class_names or ())]
        return [f"{'x'.join(map(str, model.shape))} numbers {of_what}", *names]

    for source, model in zip(sources, models, strict=True):
        for one, other in zip(made(model), made(models[0]), strict=False):  # names are compared where both have them
            if one != other:
                raise UserError(f"{source}: makes {one}, but {sources[0]} {other}; take models that are alike")


def check_asked(model: ImageModel, label: str | None, prompts: list[str]) -> None:
    """Raises UserError where the model does not take what is asked for."""
    if model.kind == "text":
        if label is not None or not prompts or not all(prompts):
            raise UserError("--prompt: a text-to-image model takes a prompt, and no --class")
    elif prompts:
        raise UserError("--prompt: this model takes no text; choose a class with --class")


def class_number(model: ImageModel, label: str) -> int:
    """Of the class of that name, else of that number; raises UserError if there is none, or several of the name."""
    names = model.class_names or []
    if found := [number for number, name in enumerate(names) if name == label]:
        if len(found) > 1:
            raise UserError(f"--class {label}: classes {', '.join(map(str, found))} have this name; give the number")
        return found[0]
    if label.isdecimal() and len(label) < 10 and int(label) < model.num_classes:
        return int(label)
    near = get_close_matches(label.lower(), [name.lower() for name in names], n=1, cutoff=0.5)
    meant = [name for name in names if name.lower() in near]
    told = f"; did you mean {meant[0]!r}?" if meant else f", from {names[0]!r} to {names[-1]!r}" if names else ""
    raise UserError(f"--class {label}: the model has {model.num_classes} classes, counted from 0{told}")


def tell_found(images: ImageSet | LatentSet | None) -> None:
    """Prints what was found in files and what is done with it."""
    if images and images.found:
        print(images.found)


def train_recipe(jobs: Jobs, recipe: AnyRecipe, run: Path, resume: bool, report: Report | None = None) -> Job:
    """Runs the recipe into the folder `run`, once nothing is wrong with it; `report` replaces the progress bar."""
    device, minutes = pick_device(recipe.device), recipe.parallel.stall_minutes
    with joined(device, minutes), advising("the same command with --resume goes on"), _locked(run):
        check_ranks(recipe)
        of_first(lambda: check_target(run, recipe, resume))  # before it makes the folder a run
        check_alike_ranks(recipe, run, device)
        if recipe.parallel.shard != "none" and rank() == 0:  # which tells it alone
            check_shard(recipe, num_ranks(), ranks_here())
        prepare = partial(_prepared, jobs, recipe, run)
        # Ranks that share weights take their networks' first passes together, and what each does by itself inside.
        job = prepare() if recipe.parallel.shard != "none" else first_then_others(prepare)
        if recipe.parallel.offload_student_optimizer:
            method: Any = job.method
            each = ", of each rank" if num_ranks() > 1 else ""
            print(f"offload: the student's updates take {size(offload(method))} of main memory{each}")
        start_run(job, run, recipe, report)
    return job


def _locked(run: Path) -> AbstractContextManager[Any]:
    """The folder is this run's, once it can be written to; the first rank sees to that."""
    if rank():
        return nullcontext()
    check_writable(run)
    return folder_lock(run)


def _prepared(jobs: Jobs, recipe: AnyRecipe, run: Path) -> Job:
    """What is to be done, once nothing is wrong with it."""
    if recipe.tensorboard:
        check_tensorboard()
    for settings, _ in optimizers(recipe):
        check_optimizer(settings)
    shown = load_prompts(recipe.samples.prompts, field="samples.prompts:") if recipe.samples.prompts else None
    if pick_device(recipe.device).type == "cpu":
        keep_freed_memory()
    compiled = prepare_compiling(pick_device(recipe.device)) if recipe.speed.compile == "blocks" else None
    job = jobs[recipe.kind](recipe, run)
    job = _compiled(job, compiled) if compiled else job
    if shown and getattr(job.method.model, "kind", None) != "text":
        raise UserError("samples.prompts: the model takes no text; leave it out")
    return job._replace(asked=shown or job.asked)


def _compiled(job: Job, kept: Path) -> Job:
    """The job with compiled blocks in its steps alone: what is drawn and judged has batches of other sizes."""
    told = f"compile: {compile_roles(job.method)} blocks, in the first steps, which take minutes the first time"
    print(f"{told}; what comes of it is kept in {kept}")
    method: Any = job.method
    method.sample, method.panel = uncompiled(method.sample), uncompiled(method.panel)
    return job._replace(evaluate=job.evaluate and uncompiled(job.evaluate))


@contextmanager
def naming_memory(run: Path, recipe: Any) -> Iterator[None]:
    """Want of memory is a UserError that names the settings which take less."""
    try:
        yield
    except Exception as error:
        told = out_of_memory(error)
        if told is None:
            raise
        exact = _smaller_parts(recipe)
        exact += ["parallel.offload_student_optimizer=true"] if _could_offload(recipe) else []
        exact += [f"checkpointing={' or '.join(more)}"] if (more := _checkpointing_more(recipe)) else []
        # In the order of what they change: rounding, more rounding, what is trained, how much it sees.
        other = ["precision=bfloat16"] if getattr(recipe, "precision", None) == "float32" else []
        other += ["optimizer.kind=adamw8bit"] if "adamw" in {each.kind for each, _ in optimizers(recipe)} else []
        other += ["a lora"] if recipe.kind == "distill" and not recipe.lora else []
        other += [f"a smaller batch_size ({recipe.batch_size})"] if recipe.batch_size > 1 else []
        ways = [f"--resume with {' and '.join(exact)}"] if exact else []
        ways += [f"begin anew with {' or '.join(other)}"] if other else []
        plan = f"; `fewstep plan {run / RECIPE}` tells what each saves" if recipe.kind == "distill" else ""
        raise UserError(f"{run}: {told}; {', or '.join(ways) or 'take a smaller model'}{plan}") from error


def _smaller_parts(recipe: Any) -> list[str]:
    """What makes them smaller, where they have more than a row."""
    if recipe.batch_size // num_ranks() == recipe.num_parts(num_ranks()):
        return []
    most = recipe.parallel.max_rows_per_part
    return [f"a smaller parallel.max_rows_per_part ({most})" if most else f"a larger accumulate ({recipe.accumulate})"]


def _could_offload(recipe: Any) -> bool:
    """Whether main memory, where it is another, can take what updates the student."""
    if recipe.kind != "distill" or recipe.parallel.offload_student_optimizer:
        return False
    return bool(recipe.student.optimizer.kind == "adamw") and pick_device(recipe.device).type == "cuda"


def _checkpointing_more(recipe: Any) -> list[str]:
    """What keeps fewer activations than the recipe does, the cheapest first."""
    now = getattr(recipe, "checkpointing", "blocks")
    ways = ["gan", "blocks"] if recipe.kind == "distill" and recipe.gan.student_weight else ["blocks"]
    return ways if now == "none" else ["blocks"] if now == "gan" else []


def start_run(job: Job, run: Path, recipe: AnyRecipe, report: Report | None) -> None:
    """Writes the recipe, and of a new run what it begins with, and trains; raises UserError if a teacher is another."""
    any_of(0)  # what ends one of them now has left nothing yet
    of_first(lambda: _begin(job, run, recipe))
    shown = report if rank() == 0 else lambda step, metrics: None
    with naming_memory(run, recipe), progress_bar(run.name, recipe.num_steps, shown, seconds=0) as show:
        train(job.method, job.batch_at, run, recipe, show, job.evaluate, job.asked)


def _begin(job: Job, run: Path, recipe: AnyRecipe) -> None:
    begun = read_run_recipe(run / RECIPE) if (run / RECIPE).exists() else None
    if begun is None:
        facts = {"data": content_digest(recipe.data), "teacher": job.teacher, "version": fewstep.__version__}
        write_text(run / FACTS, json.dumps(facts) + "\n")
    elif job.teacher and read_facts(run).get("teacher", job.teacher) != job.teacher:
        raise UserError(f"{run}: the teacher is not the one that the run began with; choose another --out")
    if recipe != begun:
        write_text(run / RECIPE, dump(recipe))  # which makes the folder a run


def check_source(recipe: AnyRecipe, field: str, name: str, runs: Path) -> None:
    """Raises UserError if the user gave images but not the `field`, whose recipe `name` is trained on others."""
    source = recipe.data.source
    if source is None or name not in recipe_names() or recipe.gives(field) or not recipe.gives("data.source"):
        return
    trained_on = recipe_of(name, runs).data.source
    if trained_on is None or origin(trained_on) != origin(source):
        raise UserError(
            f"{field}: {name} is trained on {trained_on}, not on data.source={source}; name one that is, which "
            f"`fewstep teach` makes, or say --set {field}={name} if that is meant"
        )


def finish_run(name: str, runs: Path, field: str) -> Path:
    """The run folder at a path, or of a `teach` recipe in the folder `runs`, which is finished first if need be.

    A run that is there goes on with its own recipe, whatever overrides it was started with.
    """
    if Path(name).exists():
        return Path(name)
    if name not in recipe_names():
        file = Path(f"{Path(name).name}.yaml")  # as `recipes new` leaves them
        how = f"; `fewstep teach {file}` makes it" if file.is_file() else ""
        raise UserError(f"{field}: {name!r} is neither a folder nor the name of a recipe, nor a file or a hub id{how}")
    recipe = recipe_of(name, runs)
    if not recipe.kind.startswith("teach"):
        raise UserError(f"{field}: the recipe {name!r} does not train one; `fewstep recipes` lists those that do")
    from fewstep.commands.teach import JOBS  # which imports this

    return finish(JOBS, recipe, runs / name, "teaching")


def finish(jobs: Jobs, recipe: AnyRecipe, run: Path, doing: str) -> Path:
    """The run folder, once the recipe has run in it to its end; it goes on with what is there."""
    if max(checkpoint_steps(run), default=0) < recipe.num_steps:
        try:
            train_recipe(jobs, recipe, run, resume=True)
        except Interrupted as stop:
            told = f"stopped while {doing} {run.name}; the same command goes on with it"
            raise Interrupted(told, stop.exit_code - 128) from stop
    return run


def recipe_of(name: str, runs: Path) -> AnyRecipe:
    """What the run of a recipe in the folder `runs` was made by, or would be."""
    path = runs / name / RECIPE
    return read_run_recipe(path) if path.is_file() else load_recipe(name)
