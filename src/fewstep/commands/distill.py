"""`fewstep distill`: distils a teacher into a few-step student."""

from pathlib import Path
from typing import cast

import torch

from fewstep.commands.judging import make_evaluation
from fewstep.commands.pairs import open_pair_loss, open_pairs
from fewstep.commands.runs import check_target, pick_device, start_run, tell_found
from fewstep.commands.teach import check_source, finished_run
from fewstep.data.pairs import PairSet
from fewstep.data.prompts import load_prompts
from fewstep.embedded.sources import open_captioned, open_images
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
from fewstep.training.batches import BatchAt, image_batches, pair_batches, text_batches
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
) -> tuple[BatchAt, Asked]:
    """The batch of every step, and what grids show; the run lies in the folder `runs`."""
    paired = pair_batches(model, pairs, recipe, recipe.embeddings, runs) if pairs else None
    if isinstance(recipe, RegressRecipe):
        return cast(tuple[BatchAt, Asked], paired)
    real = recipe.gan.student_weight > 0 or not recipe.student.backward_simulation
    asked: Asked = None
    if model.kind == "text":
        wanted = load_prompts(recipe.prompts.source, recipe.prompts.column) if recipe.prompts else []
        images = open_captioned(recipe.data, model, shrink=True) if real or not wanted else None
        tell_found(images)
        batch_at, asked = text_batches(model, images, wanted, real, recipe, recipe.embeddings, runs)
    elif recipe.prompts:
        raise UserError("prompts: the teacher takes no text")
    else:
        images = open_images(recipe.data, model.config, shrink=True)
        tell_found(images)
        batch_at = image_batches(images, recipe) if real else lambda step, rows: {}  # fakes have classes of their own
    if paired is None:
        return batch_at, asked

    def with_pairs(step: int, rows: range) -> Batch:
        pair = {} if step % recipe.student_every else {"pair": paired[0](step, rows)}
        return batch_at(step, rows) | pair

    return with_pairs, asked


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
