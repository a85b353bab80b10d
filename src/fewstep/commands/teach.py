"""`fewstep teach`: trains a teacher from scratch."""

from pathlib import Path

import torch

from fewstep.commands.judging import make_evaluation
from fewstep.commands.runs import check_target, open_images, pick_device, start_run
from fewstep.networks.pixel_model import PixelModel, build_unet
from fewstep.recipes.schema import TeachRecipe
from fewstep.runtime.tracking import Report
from fewstep.training.teacher import TeacherTraining


def teach(recipe: TeachRecipe, run: Path, resume: bool = False, report: Report | None = None) -> None:
    """Runs the recipe into the folder `run`; whatever is wrong with recipe, data or folder is told before any of it."""
    check_target(run, recipe, resume)
    images = open_images(recipe.data, recipe.model)
    device = pick_device(recipe.device)
    torch.manual_seed(recipe.seed)
    model = PixelModel(recipe.model, build_unet(recipe.model).to(device))
    method = TeacherTraining(recipe, model, recipe.num_steps, recipe.seed)
    start_run(method, images, run, recipe, report, make_evaluation(recipe, model, images, run))
