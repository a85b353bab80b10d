"""`fewstep distill`: distils a teacher into a few-step student."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from fewstep.commands.judging import make_evaluation
from fewstep.commands.pairs import open_pair_loss, open_pairs, pair_batches
from fewstep.commands.runs import check_target, image_batches, pick_device, start_run, tell_found
from fewstep.commands.teach import check_source, finished_run
from fewstep.commands.texts import text_batches
from fewstep.data.pairs import PairSet
from fewstep.embedded.sources import open_images
from fewstep.errors import UserError
from fewstep.models.image_model import Asked
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import is_loadable, open_model
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.precision import DTYPES, trainable
from fewstep.recipes.loading import recipe_names
from fewstep.recipes.schema import RegressRecipe, StudentRecipe
from fewstep.runtime.checkpoint import checkpoints
from fewstep.runtime.runs import find, run_folder
from fewstep.runtime.tracking import Report
from fewstep.training.dmd2 import DMD2
from fewstep.training.initialization import start_from
from fewstep.training.method import Batch
from fewstep.training.pair_loss import PairLoss
from fewstep.training.regression import Regression
from fewstep.training.roles import Roles, make_roles


def distill(recipe: StudentRecipe, run: Path, resume: bool = False, report: Report | None = None) -> None:
    """Runs the recipe into the folder `run`, after its teacher's if that is a recipe whose run is not finished."""
    check_target(run, recipe, resume)
    check_source(recipe, "teacher", recipe.teacher, run.parent)
    model = open_teacher(recipe.teacher, run.parent, recipe.teacher_config, recipe.teacher_prediction_type)
    if model.timesteps:
        raise UserError(f"teacher: {recipe.teacher} is a few-step student; name the run of its teacher")
    pairs = open_pairs(recipe, model)
    model.encode_in(DTYPES[recipe.precision])
    model.to(pick_device(recipe.device))
    pair_loss = open_pair_loss(recipe.regression, model) if pairs and recipe.regression else None
    torch.manual_seed(recipe.seed)
    method = _make_method(recipe, model, pair_loss, run)
    batch_at, asked = open_batches(recipe, model, run.parent, pairs)
    model.release()
    start_run(method, batch_at, make_evaluation(recipe, model, run), run, recipe, report, asked)


def _make_method(
    recipe: StudentRecipe, model: PixelModel | LatentModel, pair_loss: PairLoss | None, run: Path
) -> Regression | DMD2:
    """The regression or the distillation at its first step, which a run that has begun goes on from."""
    dtype = DTYPES[recipe.precision]
    if isinstance(recipe, RegressRecipe):
        student = trainable(model.denoiser.eval(), dtype)
        return Regression(recipe, model, student, cast(PairLoss, pair_loss), recipe.num_steps)
    num_stops = recipe.student.num_timesteps if recipe.critic.condition_on_stop else 0
    roles = make_roles(model, recipe.guidance_scale, recipe.gan.feature_layer, num_stops, dtype, recipe.checkpointing)
    if recipe.init_from and not checkpoints(run):  # a run that has begun goes on with its own weights
        initialize(roles, recipe.init_from, run.parent)
    return DMD2(recipe, model, roles, recipe.num_steps, recipe.batch_size, recipe.seed, pair_loss=pair_loss)


def open_batches(
    recipe: StudentRecipe, model: PixelModel | LatentModel, runs: Path, pairs: PairSet | None
) -> tuple[Callable[[int], Batch], Asked]:
    """The batch of every step, and what grids show; the run lies in the folder `runs`."""
    pairs_at, asked = pair_batches(recipe, model, pairs, runs) if pairs else (None, None)
    if isinstance(recipe, RegressRecipe):
        return cast(Callable[[int], Batch], pairs_at), asked
    if model.kind == "text":
        batch_at, asked = text_batches(recipe, model, runs)
    elif recipe.prompts:
        raise UserError("prompts: the teacher takes no text")
    else:
        images = open_images(recipe.data, model.config, shrink=True)
        tell_found(images)
        real = recipe.gan.student_weight > 0 or not recipe.student.backward_simulation
        batch_at = image_batches(images, recipe) if real else lambda step: {}  # fakes have classes of their own
    if pairs_at is None:
        return batch_at, asked
    return (lambda step: batch_at(step) | ({} if step % recipe.student_every else {"pair": pairs_at(step)})), asked


def initialize(roles: Roles, source: str, runs: Path) -> None:
    """Puts the weights of another distillation into student and critic; raises UserError if they don't fit.

    The name of a recipe means its run in the folder `runs`.
    """
    name = str(run_folder(source))
    if name in recipe_names() and not Path(name).exists():
        if not (runs / name).exists():
            raise UserError(
                f"init_from: {runs / name}: no such run; `fewstep distill {name}` makes it, null takes the teacher"
            )
        source = str(runs / source)
    try:
        found = find(source)
        found.check("state.pt")
        start_from(roles, found.checkpoint)
    except UserError as error:
        raise UserError(f"init_from: {error}") from error


def open_teacher(
    teacher: str, runs: Path, config: str | None = None, prediction_type: str | None = None
) -> PixelModel | LatentModel:
    """The model at a path or on the hub, or of a `teach` recipe's run in the folder `runs`, finished if need be."""
    if run_folder(teacher).exists() or is_loadable(teacher):
        return open_model(teacher, config, prediction_type)
    if config or prediction_type:
        raise UserError(f"teacher: {teacher!r} takes no teacher_config and no teacher_prediction_type")
    return open_model(finished_run(teacher, runs, "teacher"))
