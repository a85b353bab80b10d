"""`fewstep teach`: trains from scratch, a teacher on pixels or on latents with captions, or the autoencoder of one."""

from pathlib import Path

import torch

from fewstep.commands.judging import make_evaluation
from fewstep.commands.runs import check_target, pick_device, start_run, tell_found
from fewstep.embedded.small_models import build_autoencoder, build_pipeline
from fewstep.embedded.sources import open_captioned, open_captioned_images, open_images, origin
from fewstep.errors import Interrupted, UserError
from fewstep.models.autoencoder import Autoencoder, load_autoencoder
from fewstep.models.latent_model import LatentModel
from fewstep.models.pixel_model import PixelModel, build_unet
from fewstep.recipes.loading import load_recipe, read_run_recipe, recipe_names
from fewstep.recipes.schema import (
    AnyRecipe,
    AutoencoderRecipe,
    StudentRecipe,
    TeachingRecipe,
    TeachRecipe,
    TeachTextRecipe,
)
from fewstep.runtime.checkpoint import RECIPE, checkpoint_steps
from fewstep.runtime.runs import find
from fewstep.runtime.tracking import Report
from fewstep.training.autoencoder import AutoencoderTraining
from fewstep.training.batches import BatchAt, image_batches, text_batches
from fewstep.training.loop import Evaluate
from fewstep.training.method import Method
from fewstep.training.teacher import TeacherTraining

VOCABULARY_CAPTIONS = 10_000  # that a tokenizer is trained on, where the recipe names none
Job = tuple[Method, BatchAt, Evaluate | None]
"""What is trained, on which batch at a step, and how it is judged on the way."""


def teach(recipe: TeachingRecipe, run: Path, resume: bool = False, report: Report | None = None) -> None:
    """Runs the recipe into the folder `run`; whatever is wrong with recipe, data or folder is told before any of it."""
    check_target(run, recipe, resume)
    device = pick_device(recipe.device)
    if isinstance(recipe, TeachRecipe):
        start_run(*_pixel_teacher(recipe, device, run), run, recipe, report)
    elif isinstance(recipe, TeachTextRecipe):
        job, asked = _text_teacher(recipe, device, run)
        start_run(*job, run, recipe, report, asked)
    else:
        start_run(*_autoencoder(recipe, device), run, recipe, report)


def _pixel_teacher(recipe: TeachRecipe, device: torch.device, run: Path) -> Job:
    images = open_images(recipe.data, recipe.model, shrink=recipe.gives("model.image_size"))
    torch.manual_seed(recipe.seed)
    model = PixelModel(recipe.model, build_unet(recipe.model).to(device))
    method = TeacherTraining(recipe, model, recipe.num_steps, recipe.batch_size, recipe.seed)
    evaluate = make_evaluation(recipe, model, run)
    tell_found(images)
    return method, image_batches(images, recipe), evaluate


def _text_teacher(recipe: TeachTextRecipe, device: torch.device, run: Path) -> tuple[Job, list[str]]:
    check_source(recipe, "model.autoencoder", recipe.model.autoencoder, run.parent)
    trained = finished_run(recipe.model.autoencoder, run.parent, "model.autoencoder")
    autoencoder = load_autoencoder(find(trained).folder)
    images = open_captioned(recipe.data, autoencoder, shrink=True)
    captions = images.captions or []
    torch.manual_seed(recipe.seed)
    model = LatentModel(build_pipeline(recipe.model, autoencoder.vae, captions[:VOCABULARY_CAPTIONS]))
    model.to(device)
    method = TeacherTraining(recipe, model, recipe.num_steps, recipe.batch_size, recipe.seed)
    batch_at, asked = text_batches(model, images, [], True, recipe, recipe.embeddings, run.parent)
    evaluate = make_evaluation(recipe, model, run)
    tell_found(images)
    return (method, batch_at, evaluate), asked


def _autoencoder(recipe: AutoencoderRecipe, device: torch.device) -> Job:
    images = open_captioned_images(recipe.data, recipe.model.image_size, recipe.gives("model.image_size"))
    torch.manual_seed(recipe.seed)
    model = Autoencoder(build_autoencoder(recipe.model).to(device))
    tell_found(images)
    method = AutoencoderTraining(recipe, model, recipe.num_steps, recipe.batch_size, recipe.seed)
    return method, image_batches(images, recipe), None


def check_source(recipe: AnyRecipe, field: str, name: str, runs: Path) -> None:
    """Raises UserError if the user gave images but not the `field`, whose recipe `name` is trained on others."""
    source = recipe.data.source
    if source is None or name not in recipe_names() or recipe.gives(field) or not recipe.gives("data.source"):
        return
    trained_on = _recipe_of(name, runs).data.source
    if trained_on is None or origin(trained_on) != origin(source):
        raise UserError(
            f"{field}: {name} is trained on {trained_on}, not on data.source={source}; name one that is, which "
            f"`fewstep teach` makes, or say --set {field}={name} if that is meant"
        )


def finished_run(name: str, runs: Path, field: str) -> Path:
    """The run folder at a path, or of a `teach` recipe in the folder `runs`, which is finished first if need be.

    A run that is there goes on with its own recipe, whatever overrides it was started with.
    """
    if Path(name).exists():
        return Path(name)
    if name not in recipe_names():
        raise UserError(f"{field}: {name!r} is neither a folder nor the name of a recipe, nor a file or a hub id")
    run, recipe = runs / name, _recipe_of(name, runs)
    if isinstance(recipe, StudentRecipe):
        raise UserError(f"{field}: the recipe {name!r} does not train one; `fewstep recipes` lists those that do")
    if max(checkpoint_steps(run), default=0) < recipe.num_steps:
        try:
            teach(recipe, run, resume=True)
        except Interrupted as stop:
            raise Interrupted(f"stopped while teaching {name}; the same command goes on with it") from stop
    return run


def _recipe_of(name: str, runs: Path) -> AnyRecipe:
    """What the run of a recipe in the folder `runs` was made by, or would be."""
    path = runs / name / RECIPE
    return read_run_recipe(path) if path.is_file() else load_recipe(name)
