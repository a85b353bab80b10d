"""`fewstep distill`: distils a teacher into a few-step student."""

from collections.abc import Callable
from pathlib import Path

import torch

from fewstep.commands.judging import make_evaluation
from fewstep.commands.runs import FROZEN, check_target, image_batches, open_images, open_model, pick_device, start_run
from fewstep.commands.teach import finished_run
from fewstep.commands.texts import text_batches
from fewstep.errors import UserError
from fewstep.networks.latent_model import LatentModel
from fewstep.networks.pixel_model import PixelModel
from fewstep.networks.precision import DTYPES
from fewstep.networks.pretrained import is_loadable
from fewstep.networks.roles import Roles, make_roles
from fewstep.recipes.loading import recipe_names
from fewstep.recipes.schema import DistillRecipe
from fewstep.runtime.checkpoint import checkpoints
from fewstep.runtime.selection import find_checkpoint, run_and_choice
from fewstep.runtime.tracking import Report
from fewstep.training.dmd2 import DMD2
from fewstep.training.initialization import start_from
from fewstep.training.method import Batch


def distill(recipe: DistillRecipe, run: Path, resume: bool = False, report: Report | None = None) -> None:
    """Runs the recipe into the folder `run`, after its teacher's if that is a recipe whose run is not finished."""
    check_target(run, recipe, resume)
    model = open_teacher(recipe.teacher, run.parent, recipe.teacher_config, recipe.teacher_prediction_type)
    if model.timesteps:
        raise UserError(f"teacher: {recipe.teacher} is a few-step student; name the run of its teacher")
    dtype = DTYPES[recipe.precision]
    model.encode_in(dtype)
    model.to(pick_device(recipe.device))
    torch.manual_seed(recipe.seed)
    num_stops = recipe.student.num_timesteps if recipe.critic.condition_on_stop else 0
    roles = make_roles(model, recipe.guidance_scale, recipe.gan.feature_layer, num_stops, dtype)
    if recipe.init_from and not checkpoints(run):  # a run that has begun goes on with its own weights
        initialize(roles, recipe.init_from, run.parent)
    method = DMD2(recipe, model, roles, recipe.num_steps, recipe.batch_size, recipe.seed)
    if isinstance(model, LatentModel):
        model.frozen = run / FROZEN
    batch_at = open_batches(recipe, model, run.parent)
    model.release()
    start_run(method, batch_at, make_evaluation(recipe, model, run), run, recipe, report)


def open_batches(recipe: DistillRecipe, model: PixelModel | LatentModel, runs: Path) -> Callable[[int], Batch]:
    """The batch of every step; the run lies in the folder `runs`."""
    if isinstance(model, LatentModel):
        return text_batches(recipe, model, runs)
    if recipe.prompts:
        raise UserError("prompts: the teacher takes no text")
    images = open_images(recipe.data, model.config)
    real = recipe.gan.student_weight > 0 or not recipe.student.backward_simulation
    return image_batches(images, recipe) if real else lambda step: {}  # fakes are drawn for classes of their own


def initialize(roles: Roles, source: str, runs: Path) -> None:
    """Puts the weights of another distillation into student and critic; raises UserError if they don't fit.

    The name of a recipe means its run in the folder `runs`.
    """
    name = source.partition("@")[0]
    if name in recipe_names() and not Path(name).exists():
        if not (runs / name).exists():
            raise UserError(f"init_from: {runs} has no run {name}; make it first: fewstep distill {name}")
        source = str(runs / source)
    try:
        start_from(roles, find_checkpoint(source))
    except UserError as error:
        raise UserError(f"init_from: {error}") from error


def open_teacher(
    teacher: str, runs: Path, config: str | None = None, prediction_type: str | None = None
) -> PixelModel | LatentModel:
    """The model at a path or on the hub, or of a `teach` recipe's run in the folder `runs`, finished if need be."""
    if run_and_choice(teacher)[0].exists() or is_loadable(teacher):
        return open_model(teacher, config, prediction_type)
    if config or prediction_type:
        raise UserError(f"teacher: {teacher!r} takes no teacher_config and no teacher_prediction_type")
    return open_model(finished_run(teacher, runs, "teacher"))
