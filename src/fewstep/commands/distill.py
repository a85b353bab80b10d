"""`fewstep distill`: distils a teacher into a few-step student."""

from pathlib import Path

import torch

from fewstep.commands.runs import check_target, open_captioned, open_images, open_model, pick_device, start_run
from fewstep.commands.teach import teach
from fewstep.errors import Interrupted, UserError
from fewstep.networks.latent_model import LatentModel
from fewstep.networks.pixel_model import PixelModel
from fewstep.networks.pretrained import is_loadable
from fewstep.networks.roles import make_roles
from fewstep.recipes.loading import load_recipe, read_run_recipe, recipe_names
from fewstep.recipes.schema import DistillRecipe, TeachRecipe
from fewstep.runtime.checkpoint import RECIPE, checkpoints, step_name
from fewstep.runtime.tracking import Report
from fewstep.training.dmd2 import DMD2

FROZEN = "frozen"  # folder of a run: the autoencoder and the text encoders, which its checkpoints link to
NUM_GRID_PROMPTS = 8  # captions that the sample grids show


def distill(recipe: DistillRecipe, run: Path, resume: bool = False, report: Report | None = None) -> None:
    """Runs the recipe into the folder `run`, after its teacher's if that is a recipe whose run is not finished."""
    check_target(run, recipe, resume)
    model = open_teacher(recipe.teacher, run.parent, recipe.teacher_config, recipe.teacher_prediction_type)
    if model.timesteps:
        raise UserError(f"teacher: {recipe.teacher} is a few-step student; name the run of its teacher")
    if isinstance(model, LatentModel):
        images = open_captioned(recipe.data, model)
        model.frozen = run / FROZEN
        model.prompts = (images.captions or [""])[:NUM_GRID_PROMPTS]
    else:
        images = open_images(recipe.data, model.config)
    model.to(pick_device(recipe.device))
    torch.manual_seed(recipe.seed)
    num_stops = recipe.student.num_timesteps if recipe.critic.condition_on_stop else 0
    roles = make_roles(model, recipe.guidance_scale, recipe.gan.feature_layer, num_stops)
    model.release()
    method = DMD2(recipe, model, roles, recipe.num_steps, recipe.batch_size, recipe.seed)
    start_run(method, images, run, recipe, report)


def open_teacher(
    teacher: str, runs: Path, config: str | None = None, prediction_type: str | None = None
) -> PixelModel | LatentModel:
    """The model at a path or on the hub, or of a `teach` recipe's run in the folder `runs`, finished first if need be.

    A run that is there goes on with its own recipe, whatever overrides it was started with.
    """
    if Path(teacher).exists() or is_loadable(teacher):
        return open_model(teacher, config, prediction_type)
    if teacher not in recipe_names():
        raise UserError(f"teacher: {teacher!r} is neither a folder nor the name of a recipe, nor a file or a hub id")
    if config or prediction_type:
        raise UserError(f"teacher: the recipe {teacher!r} takes no teacher_config and no teacher_prediction_type")
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
