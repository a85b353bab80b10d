"""`fewstep distill`: distils a teacher into a few-step student."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fewstep.commands.drawing import open_pairs
from fewstep.commands.judging import make_evaluation
from fewstep.commands.places import tell_done, tell_health
from fewstep.commands.runs import (
    Job,
    Jobs,
    check_source,
    device_memory,
    finish,
    finish_run,
    pick_device,
    read_facts,
    recipe_of,
    tell_found,
    train_recipe,
)
from fewstep.data.settings import EmbeddingSettings
from fewstep.data.texts import load_prompts
from fewstep.diffusion.denoiser import Guided, unguided
from fewstep.embedded.sources import open_captioned, open_images
from fewstep.errors import Interrupted, UserError
from fewstep.evaluation.lpips import load_lpips
from fewstep.models.autoencoder import load_tiny_decoder
from fewstep.models.image_model import Asked, ImageModel
from fewstep.models.loading.pretrained import is_loadable, open_model
from fewstep.models.outline import Outline
from fewstep.networks.families import use_family
from fewstep.networks.fingerprint import fingerprint
from fewstep.networks.precision import DTYPES, trainable
from fewstep.recipes.loading import recipe_names
from fewstep.recipes.schema import DistillRecipe, StudentRecipe
from fewstep.runtime.checkpoint import RECIPE, STATES, checkpoints
from fewstep.runtime.distributed import environment, first_then_others, num_ranks, place
from fewstep.runtime.runs import find, is_run, run_folder
from fewstep.runtime.tracking import Report
from fewstep.training.batches import BatchAt, image_batches, pair_batches, text_batches
from fewstep.training.dmd2 import DMD2
from fewstep.training.method import Method
from fewstep.training.parallel import check_units, divide
from fewstep.training.planning import Plan, checkpoint_bytes, plan, trained
from fewstep.training.regression import PairLoss, Regression
from fewstep.training.roles import Roles, roles_of, start_from
from fewstep.training.settings import RegressionSettings
from fewstep.training.teacher_errors import null_error, teacher_errors

ERROR = 0.05  # of a plan's peak, at most, against what was measured (benchmarks)


def distill(recipe: StudentRecipe, run: Path, resume: bool = False, report: Report | None = None) -> None:
    """Runs the recipe into the folder `run`, after what it builds on, where that is recipes whose runs lack or wait."""
    job = train_recipe(JOBS, recipe, run, resume, report)
    prompt = ["--prompt", job.asked[0]] if job.method.model.kind == "text" and job.asked else []
    teacher = next((str(each) for each in (recipe.teacher, run.parent / recipe.teacher) if is_run(each)), None)
    lora = recipe.kind == "distill" and recipe.lora is not None
    judging = [["evaluate", *([teacher] if teacher else []), str(run)]] if recipe.data.source else []  # by real images
    exporting = [f"{run.name}.safetensors", "--to", "lora"] if lora else [f"{run.name}-diffusers"]
    looking = [["sample", str(run), *map(str, prompt)], ["report", str(run)]]
    following = [*looking, *judging, ["export", str(run), *exporting]]
    tell_done(f"{run}, {recipe.num_steps:,} steps", *map(shlex.join, following))
    tell_health(run, recipe)


class Opened(NamedTuple):
    """What each rank finds by itself, and before anything lies on a device."""

    model: Any
    told_from_others: str
    pairs: Any
    plan: Plan | None


def _job(recipe: StudentRecipe, run: Path) -> Job:
    opened = first_then_others(lambda: _open(recipe, run))
    model, device = opened.model, pick_device(recipe.device)
    if recipe.parallel.shard == "none":
        model.to(device)
    torch.manual_seed(recipe.seed)
    method: Method
    if recipe.kind == "distill":
        method, batch_at, asked = _distillation(recipe, run, opened, device)
    else:
        pair_loss: Any = open_pair_loss(recipe.regression, model)
        student = trainable(model.denoiser.eval(), DTYPES[recipe.precision])
        method = Regression(recipe, model, student, pair_loss, recipe.num_steps)
        batch_at, asked = pair_batches(model, opened.pairs, recipe, recipe.embeddings, run.parent)
    evaluate = make_evaluation(recipe, model, run)
    model.release()
    return Job(method, batch_at, evaluate, asked, opened.told_from_others)


def _open(recipe: StudentRecipe, run: Path) -> Opened:
    model, runs = open_teacher(recipe, run.parent), run.parent
    # Quick, also for the largest; in float32 if it is divided, as of a run whose ranks don't share it.
    as_if = torch.float32 if recipe.parallel.shard != "none" else None
    told_from_others = fingerprint([model.network], first=64, dtype=as_if)
    pairs: Any = None
    if recipe.regression and (recipe.kind == "regress" or recipe.regression_weight):
        # Raises UserError if they are another teacher's than the one that was loaded, or drawn otherwise.
        pairs = open_pairs(recipe, model, runs)
    model.encode_in(DTYPES[recipe.precision])
    found = _plan_of(recipe, model, pick_device(recipe.device), run) if recipe.kind == "distill" else None
    if recipe.kind == "distill" and recipe.init_from and not checkpoints(run):
        finish_start(recipe, recipe.init_from, run, told_from_others)
    return Opened(model, told_from_others, pairs, found)


def _distillation(
    recipe: DistillRecipe, run: Path, opened: Opened, device: torch.device
) -> tuple[DMD2, BatchAt, Asked]:
    """The method, and what it is trained on; ranks that share weights come here together."""
    model, runs, settings, gan = opened.model, run.parent, recipe.parallel, recipe.gan.student_weight > 0
    roles, units = roles_of(recipe, model, settings.shard != "none"), None
    if not gan:
        roles.discriminator.to("cpu")  # 0.4 GB of SDXL's, which no pass needs
    if settings.shard != "none":
        check_units(roles, gan)
        units = divide(roles, settings, device, DTYPES[recipe.precision], gan)
        print(f"shard: each network in {len(units.student)} units among {num_ranks()} ranks")
    if recipe.init_from and not checkpoints(run):  # a run that has begun goes on with its own weights
        initialize(roles, recipe.init_from, runs)
    pair_loss: Any = open_pair_loss(recipe.regression, model) if recipe.regression and opened.pairs else None
    method = DMD2(recipe, model, roles, recipe.num_steps, recipe.batch_size, recipe.seed, pair_loss=pair_loss)
    if units:
        units.given_to(method)
    print(*summary(recipe, method, opened.plan, run), sep="\n")
    batch_at, asked = first_then_others(lambda: open_batches(recipe, model, runs))
    if gan:
        method.teacher_errors = teacher_errors(unguided(method.teacher), model, batch_at, recipe)
        if isinstance(method.teacher, Guided):
            method.null_error = null_error(method.teacher, model, batch_at, recipe)
    if opened.pairs:
        pairs_at, _ = first_then_others(lambda: pair_batches(model, opened.pairs, recipe, recipe.embeddings, runs))
        batch_at = with_pairs(batch_at, pairs_at, recipe.student_every)
    return method, batch_at, asked


def _plan_of(recipe: DistillRecipe, model: ImageModel, device: torch.device, run: Path) -> Plan | None:
    """What a step takes of a GPU, before anything is there; raises UserError if it surely has less."""
    if (memory := device_memory(device)) is None:
        return None
    _, num = place()
    found = plan(recipe, Outline.of(model), num_ranks=num, machines=num // environment("LOCAL_WORLD_SIZE", num))
    if found.peak * (1 - ERROR) > memory:
        has, takes = f"{memory / 1e9:.1f} GB", f"{found.peak / 1e9:.1f} GB ({found.where})"
        ask = f"fewstep plan {_named(run)} --memory {round(memory / 2**30)}GB{f' --ranks {num}' if num > 1 else ''}"
        raise UserError(f"device: has {has}, and this recipe takes {takes}; `{ask}` tells which settings take less")
    return found


def summary(recipe: DistillRecipe, method: DMD2, found: Plan | None, run: Path) -> Iterator[str]:
    """Three lines on what a run takes; peak and arithmetic on a GPU alone, for they take seconds to find."""
    what = [f"{num / 1e6:,.1f} M of the {role}" for role, num in trained(method).items()]
    base = sum(p.numel() for p in method.teacher.parameters())
    yield f"plan: trains {', '.join(what)}; the teacher has {base / 1e6:,.1f} M"
    yield f"plan: a checkpoint takes {checkpoint_bytes(method, recipe) / 1e9:.2f} GB on disk"
    if found is None:
        yield f"plan: `fewstep plan {_named(run)}` tells memory and arithmetic"
    else:
        each = found.cycle / 1e12 / found.student_every
        yield f"plan: {found.peak / 1e9:.1f} GB at most ({found.where}), {each:.3g} TFLOP a step on average"


def _named(run: Path) -> str:
    return run.name if run.name in recipe_names() else "RECIPE"


JOBS: Jobs = {"distill": _job, "regress": _job}


def open_batches(recipe: DistillRecipe, model: Any, runs: Path) -> tuple[BatchAt, Asked]:
    """The batch of every step but for pairs, and what grids show."""
    real = recipe.gan.student_weight > 0 or not recipe.student.backward_simulation
    if model.kind == "text":
        wanted = load_prompts(recipe.prompts.source, recipe.prompts.column) if recipe.prompts else []
        images = open_captioned(recipe.data, model, shrink=True) if real or not wanted else None
        tell_found(images)
        if recipe.data.source is None:
            print("no images (data.source is null): prompts alone, and no GAN")
        return text_batches(model, images, wanted, real, recipe, recipe.embeddings, runs)
    if recipe.prompts or recipe.embeddings != EmbeddingSettings():
        raise UserError(f"{'prompts' if recipe.prompts else 'embeddings'}: the teacher takes no text")
    images = open_images(recipe.data, model, shrink=True)
    tell_found(images)
    return (image_batches(images, recipe) if real else lambda step, rows: {}), None  # fakes have classes of their own


def with_pairs(batch_at: BatchAt, pairs_at: BatchAt, student_every: int) -> BatchAt:
    """Pairs beside the batch in the student's turns."""
    return lambda step, rows: batch_at(step, rows) | ({} if step % student_every else {"pair": pairs_at(step, rows)})


SHARED = ("teacher", "teacher_config", "teacher_prediction_type", "teacher_family", "device")


def finish_start(recipe: DistillRecipe, name: str, run: Path, teacher: str) -> None:
    """Runs the recipe that `init_from` names to its end, if it names one alone, with the teacher and images of this.

    A run that is there goes on with its own recipe. Raises UserError if it can't be made, or is of another teacher than
    the one with this fingerprint.
    """
    start = run.parent / name
    if name not in recipe_names() or _lies_elsewhere(name, start):
        return
    _check_circle(name, run)
    own: Any = recipe_of(name, run.parent)
    if own.kind not in JOBS:
        raise UserError(f"init_from: {name} makes no student; name a distillation or a regression")
    if not (start / RECIPE).is_file():
        shared = {key: getattr(recipe, key) for key in SHARED}
        shared |= {"data": recipe.data} if recipe.data.source and own.data.source else {}
        own = own.model_copy(update=shared)
    try:
        finish(JOBS, own, start, "making")
    except Interrupted:
        raise
    except UserError as error:
        raise UserError(f"init_from: {name}: {error}") from error
    if not recipe.gives("init_from") and read_facts(start).get("teacher", teacher) != teacher:
        ways = f"choose another --out, or say --set init_from={name} if that is meant"
        raise UserError(f"init_from: {start} is a student of another teacher; {ways}")


def _lies_elsewhere(name: str, start: Path) -> bool:
    """Whether it is a folder here that is not the run beside this one."""
    return Path(name).exists() and Path(name).resolve() != start.resolve()


def _check_circle(name: str | None, run: Path) -> None:
    """Raises UserError if a run would have to start from itself."""
    names = [run.name]
    while name in recipe_names() and not _lies_elsewhere(name, run.parent / name):
        names.append(name)
        if names.count(name) > 1:
            raise UserError(f"init_from: goes round in a circle ({' -> '.join(names)})")
        name = getattr(recipe_of(name, run.parent), "init_from", None)


def initialize(roles: Roles, source: str, runs: Path) -> None:
    """Puts the weights of another distillation into student and critic; raises UserError if they don't fit.

    The name of a recipe means its run in the folder `runs`.
    """
    name = str(run_folder(source))
    if name in recipe_names() and not Path(name).exists():
        if not (there := runs / name).exists():
            told = f"no such run; `fewstep distill {name}` makes it, null takes the teacher"
            raise UserError(f"init_from: {there}: {told}")
        source = str(runs / source)
    try:
        found = find(source)
        found.check(*STATES)
        start_from(roles, found.checkpoint)
    except UserError as error:
        raise UserError(f"init_from: {error}") from error


def open_teacher(recipe: StudentRecipe, runs: Path) -> Any:
    """The model at a path or on the hub, or of a `teach` recipe's run in the folder `runs`, finished if need be."""
    check_source(recipe, "teacher", recipe.teacher, runs)
    use_family(recipe.teacher_family)
    name, told = recipe.teacher, (recipe.teacher_config, recipe.teacher_prediction_type)
    if not run_folder(name).exists() and not is_loadable(name):
        if any(told):
            raise UserError(f"teacher: {name!r} takes no teacher_config and no teacher_prediction_type")
        name = str(finish_run(name, runs, "teacher"))
    model = open_model(name, *told, _held_in(recipe))
    if model.timesteps:
        raise UserError(f"teacher: {recipe.teacher} is a few-step student; name the run of its teacher")
    return model


def _held_in(recipe: StudentRecipe) -> torch.dtype | None:
    """The dtype that the teacher's network is needed in: float32 by those who train copies, or ask which pairs it made.

    Fingerprints of pairs are of its float32 weights. Ranks that divide it do with what its files have.
    """
    if recipe.kind == "distill" and recipe.parallel.shard != "none":
        return torch.float32 if recipe.regression_weight else None
    shared = recipe.kind == "distill" and recipe.lora and not recipe.regression_weight
    return DTYPES[recipe.precision] if shared else torch.float32


def open_pair_loss(settings: RegressionSettings, model: ImageModel) -> PairLoss:
    """The loss that the settings name, on the model's device."""
    if settings.decoder and model.latent_space is None:
        raise UserError("regression.decoder: the teacher has no latents to decode")
    decode = load_tiny_decoder(Path(settings.decoder), model.shape[0], model.device) if settings.decoder else None
    if not settings.lpips:
        return PairLoss(model)
    lpips = load_lpips(settings.lpips, settings.lpips_size, model.device, model.channels, model.image_size)
    return PairLoss(model, lpips, decode)
