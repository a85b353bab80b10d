"""`fewstep distill`: distils a teacher into a few-step student."""

import shlex
from pathlib import Path
from typing import Any

import torch

from fewstep.commands.judging import make_evaluation
from fewstep.commands.runs import (
    Job,
    Jobs,
    check_source,
    finished_run,
    pick_device,
    tell_done,
    tell_found,
    train_recipe,
)
from fewstep.data.pairs import PairSet, load_pairs
from fewstep.data.settings import EmbeddingSettings
from fewstep.data.texts import load_prompts
from fewstep.embedded.sources import open_captioned, open_images
from fewstep.errors import UserError
from fewstep.evaluation.lpips import load_lpips
from fewstep.models.autoencoder import load_tiny_decoder
from fewstep.models.image_model import Asked, ImageModel
from fewstep.models.loading.pretrained import is_loadable, open_model
from fewstep.models.sampler import parse_sampler
from fewstep.networks.families import use_family
from fewstep.networks.fingerprint import fingerprint
from fewstep.networks.precision import DTYPES, trainable
from fewstep.recipes.loading import recipe_names
from fewstep.recipes.schema import DistillRecipe, RegressRecipe, StudentRecipe
from fewstep.runtime.checkpoint import RECIPE, checkpoints
from fewstep.runtime.runs import find, run_folder
from fewstep.runtime.tracking import Report
from fewstep.training.batches import BatchAt, image_batches, pair_batches, text_batches
from fewstep.training.dmd2 import DMD2
from fewstep.training.regression import PairLoss, Regression
from fewstep.training.roles import Roles, make_roles, start_from
from fewstep.training.settings import RegressionSettings


def distill(recipe: StudentRecipe, run: Path, resume: bool = False, report: Report | None = None) -> None:
    """Runs the recipe into the folder `run`, after its teacher's if that is a recipe whose run is not finished."""
    job = train_recipe(JOBS, recipe, run, resume, report)
    prompt = ["--prompt", job.asked[0]] if job.method.model.kind == "text" and job.asked else []
    teacher = next((str(each) for each in (recipe.teacher, run.parent / recipe.teacher) if is_run(each)), None)
    tell_done(
        f"{run}, {recipe.num_steps:,} steps",
        shlex.join(["sample", str(run), *map(str, prompt)]),
        shlex.join(["evaluate", *([teacher] if teacher else []), str(run)]),
        shlex.join(["export", str(run), f"{run.name}-diffusers"]),
    )


def is_run(folder: str | Path) -> bool:
    return (run_folder(folder) / RECIPE).is_file()


def _distillation(recipe: DistillRecipe, run: Path) -> Job:
    model = open_teacher(recipe, run.parent)
    told_from_others = fingerprint([model.network], first=64)  # quick, also for the largest
    pairs = open_pairs(recipe.regression, model) if recipe.regression and recipe.regression_weight else None
    dtype = place(model, recipe)
    pair_loss = open_pair_loss(recipe.regression, model) if pairs and recipe.regression else None
    torch.manual_seed(recipe.seed)
    num_stops = recipe.student.num_timesteps if recipe.critic.condition_on_stop else 0
    roles = make_roles(model, recipe.guidance_scale, recipe.gan.feature_layer, num_stops, dtype, recipe.checkpointing)
    if recipe.init_from and not checkpoints(run):  # a run that has begun goes on with its own weights
        initialize(roles, recipe.init_from, run.parent)
    method = DMD2(recipe, model, roles, recipe.num_steps, recipe.batch_size, recipe.seed, pair_loss=pair_loss)
    batch_at, asked = open_batches(recipe, model, run.parent)
    if pairs:
        pairs_at, _ = pair_batches(model, pairs, recipe, recipe.embeddings, run.parent)
        batch_at = with_pairs(batch_at, pairs_at, recipe.student_every)
    model.release()
    return Job(method, batch_at, make_evaluation(recipe, model, run), asked, told_from_others)


def _regression(recipe: RegressRecipe, run: Path) -> Job:
    model = open_teacher(recipe, run.parent)
    told_from_others = fingerprint([model.network], first=64)  # quick, also for the largest
    pairs = open_pairs(recipe.regression, model)
    dtype = place(model, recipe)
    pair_loss = open_pair_loss(recipe.regression, model)
    torch.manual_seed(recipe.seed)
    student = trainable(model.denoiser.eval(), dtype)
    method = Regression(recipe, model, student, pair_loss, recipe.num_steps)
    batch_at, asked = pair_batches(model, pairs, recipe, recipe.embeddings, run.parent)
    model.release()
    return Job(method, batch_at, make_evaluation(recipe, model, run), asked, told_from_others)


JOBS: Jobs = {"distill": _distillation, "regress": _regression}


def place(model: ImageModel, recipe: StudentRecipe) -> torch.dtype:
    """Puts the teacher on the recipe's device in its precision, which is given."""
    dtype = DTYPES[recipe.precision]
    model.encode_in(dtype)
    model.to(pick_device(recipe.device))
    return dtype


def open_batches(recipe: DistillRecipe, model: Any, runs: Path) -> tuple[BatchAt, Asked]:
    """The batch of every step but for pairs, and what grids show; the run lies in the folder `runs`."""
    real = recipe.gan.student_weight > 0 or not recipe.student.backward_simulation
    if model.kind == "text":
        wanted = load_prompts(recipe.prompts.source, recipe.prompts.column) if recipe.prompts else []
        images = open_captioned(recipe.data, model, shrink=True) if real or not wanted else None
        tell_found(images)
        return text_batches(model, images, wanted, real, recipe, recipe.embeddings, runs)
    if recipe.prompts or recipe.embeddings != EmbeddingSettings():
        raise UserError(f"{'prompts' if recipe.prompts else 'embeddings'}: the teacher takes no text")
    images = open_images(recipe.data, model, shrink=True)
    tell_found(images)
    return (image_batches(images, recipe) if real else lambda step, rows: {}), None  # fakes have classes of their own


def with_pairs(batch_at: BatchAt, pairs_at: BatchAt, student_every: int) -> BatchAt:
    """Pairs beside the batch in the student's turns."""
    return lambda step, rows: batch_at(step, rows) | ({} if step % student_every else {"pair": pairs_at(step, rows)})


def initialize(roles: Roles, source: str, runs: Path) -> None:
    """Puts the weights of another distillation into student and critic; raises UserError if they don't fit.

    The name of a recipe means its run in the folder `runs`.
    """
    name = str(run_folder(source))
    if name in recipe_names() and not Path(name).exists():
        if not (there := runs / name).exists():
            raise UserError(
                f"init_from: {there}: no such run; `fewstep distill {name}` makes it, null takes the teacher"
            )
        source = str(runs / source)
    try:
        found = find(source)
        found.check("state.pt")
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
        name = str(finished_run(name, runs, "teacher"))
    model = open_model(name, *told)
    if model.timesteps:
        raise UserError(f"teacher: {recipe.teacher} is a few-step student; name the run of its teacher")
    return model


def open_pairs(settings: RegressionSettings, model: ImageModel) -> PairSet:
    """The pairs of a teacher as it was loaded; raises UserError if they are another teacher's, or drawn otherwise."""
    sampler = str(parse_sampler(settings.sampler))
    return load_pairs(Path(settings.pairs), model.fingerprint, sampler, model.shape)


def open_pair_loss(settings: RegressionSettings, model: ImageModel) -> PairLoss:
    """The loss that the settings name, on the model's device."""
    decode, latent = None, model.latent_space is not None
    if settings.decoder:
        if not latent:
            raise UserError("regression.decoder: the teacher has no latents to decode")
        decode = load_tiny_decoder(Path(settings.decoder), model.shape[0], model.device)
    if not settings.lpips:
        return PairLoss(model)
    lpips = load_lpips(settings.lpips, settings.lpips_size, model.device, model.channels, model.image_size)
    return PairLoss(model, lpips, decode)
