"""`fewstep distill`: distils a teacher into a few-step student."""

from pathlib import Path

import torch

from fewstep.commands.judging import make_evaluation
from fewstep.commands.runs import check_target, open_captioned, open_images, open_model, pick_device, start_run
from fewstep.commands.teach import teach
from fewstep.errors import Interrupted, UserError
from fewstep.networks.latent_model import LatentModel
from fewstep.networks.pixel_model import PixelModel
from fewstep.networks.precision import DTYPES
from fewstep.networks.roles import Roles, make_roles
from fewstep.recipes.loading import load_recipe, read_run_recipe, recipe_names
from fewstep.recipes.schema import DistillRecipe, TeachRecipe
from fewstep.runtime.checkpoint import RECIPE, checkpoints, step_name
from fewstep.runtime.selection import find_checkpoint
from fewstep.runtime.tracking import Report
from fewstep.training.dmd2 import DMD2
from fewstep.training.initialization import start_from

NUM_GRID_PROMPTS = 8  # captions that the sample grids show


def distill(recipe: DistillRecipe, run: Path, resume: bool = False, report: Report | None = None) -> None:
    """Runs the recipe into the folder `run`, after its teacher's if that is a recipe whose run is not finished."""
    check_target(run, recipe, resume)
    model = open_teacher(recipe.teacher, run.parent)
    if model.timesteps:
        raise UserError(f"teacher: {recipe.teacher} is a few-step student; name the run of its teacher")
    if isinstance(model, LatentModel):
        images = open_captioned(recipe.data, model)
        model.prompts = (images.captions or [""])[:NUM_GRID_PROMPTS]
    else:
        images = open_images(recipe.data, model.config)
    dtype = DTYPES[recipe.precision]
    model.encode_in(dtype)
    model.to(pick_device(recipe.device))
    torch.manual_seed(recipe.seed)
    num_stops = recipe.student.num_timesteps if recipe.critic.condition_on_stop else 0
    roles = make_roles(model, recipe.guidance_scale, recipe.gan.feature_layer, num_stops, dtype)
    if recipe.init_from and not checkpoints(run):  # a run that has begun goes on with its own weights
        initialize(roles, recipe.init_from)
    method = DMD2(recipe, model, roles, recipe.num_steps, recipe.batch_size, recipe.seed)
    start_run(method, images, run, recipe, report, make_evaluation(recipe, model, images, run))


def initialize(roles: Roles, source: str) -> None:
    """Puts the weights of another distillation into student and critic; raises UserError if they don't fit."""
    try:
        start_from(roles, find_checkpoint(source))
    except UserError as error:
        raise UserError(f"init_from: {error}") from error


def open_teacher(teacher: str, runs: Path) -> PixelModel | LatentModel:
    """The model at a path, or of a `teach` recipe's run in the folder `runs`, which is finished first if need be.

    A run that is there goes on with its own recipe, whatever overrides it was started with.
    """
    if Path(teacher).exists():
        return open_model(Path(teacher))
    if teacher not in recipe_names():
        raise UserError(f"teacher: {teacher!r} is neither a folder nor the name of a recipe")
    run = runs / teacher
    recipe = read_run_recipe(run / RECIPE) if (run / RECIPE).is_file() else load_recipe(teacher)
    if not isinstance(recipe, TeachRecipe):
        raise UserError(f"teacher: the recipe {teacher!r} does not train a teacher")
    finished = checkpoints(run)
    if not finished or finished[-1].name < step_name(recipe.num_steps):
        try:
            teach(recipe, run, resume=True)
        except Interrupted as stop:
            raise Interrupted(f"stopped while teaching {teacher}; the same command goes on with it") from stop
    return open_model(run)
