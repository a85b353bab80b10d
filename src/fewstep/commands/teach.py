"""`fewstep teach`: trains from scratch, a teacher on pixels or on latents with captions, or the autoencoder of one."""

import shlex
from pathlib import Path

import torch

from fewstep.commands.judging import make_evaluation
from fewstep.commands.places import tell_done, tell_health
from fewstep.commands.runs import Job, Jobs, check_source, finish_run, pick_device, tell_found, train_recipe
from fewstep.embedded.small_models import build_autoencoder, build_pipeline
from fewstep.embedded.sources import open_captioned, open_captioned_images, open_images
from fewstep.models.autoencoder import Autoencoder, load_autoencoder
from fewstep.models.latent_model import LatentModel
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.recipes.schema import AutoencoderRecipe, TeachingRecipe, TeachRecipe, TeachTextRecipe
from fewstep.runtime.runs import find
from fewstep.runtime.tracking import Report
from fewstep.training.autoencoder import AutoencoderTraining
from fewstep.training.batches import image_batches, text_batches
from fewstep.training.teacher import TeacherTraining

VOCABULARY_CAPTIONS = 10_000  # that a tokenizer is trained on, where the recipe names none


def teach(recipe: TeachingRecipe, run: Path, resume: bool = False, report: Report | None = None) -> None:
    """Runs the recipe into the folder `run`."""
    train_recipe(JOBS, recipe, run, resume, report)
    tell_done(f"{run}, {recipe.num_steps:,} steps", *what_comes_next(recipe, run))
    tell_health(run, recipe)


def what_comes_next(recipe: TeachingRecipe, run: Path) -> list[str]:
    """The commands that one may want behind a teacher or an autoencoder."""
    if recipe.kind == "teach-autoencoder":
        source, out = str(recipe.data.source), f"{run}-latents"
        return [shlex.join(["data", "latents", "--model", str(run), "--source", source, "--out", out])]
    stem = run.name.removesuffix("-teacher")
    beside, shipped = f"{stem}-1step.yaml", "digits-1step" if recipe.kind == "teach" else "shapes-1step"
    student = beside if Path(beside).is_file() else shipped
    images = [f"--set=data.source={recipe.data.source}"] if student == shipped != f"{stem}-1step" else []
    prompt = ["--prompt", "TEXT"] if recipe.kind == "teach-text" else []
    sample, distill = ["sample", str(run), *prompt], ["distill", student, f"--set=teacher={run}", *images]
    return [shlex.join(sample), shlex.join(distill)]


def _pixel_teacher(recipe: TeachRecipe, run: Path) -> Job:
    device = pick_device(recipe.device)
    images = open_images(recipe.data, recipe.model, shrink=recipe.gives("model.image_size"))
    torch.manual_seed(recipe.seed)
    model = PixelModel(recipe.model, build_unet(recipe.model).to(device), class_names=images.class_names)
    method = TeacherTraining(recipe, model, recipe.num_steps, recipe.batch_size, recipe.seed)
    evaluate = make_evaluation(recipe, model, run)
    tell_found(images)
    return Job(method, image_batches(images, recipe), evaluate)


def _text_teacher(recipe: TeachTextRecipe, run: Path) -> Job:
    device = pick_device(recipe.device)
    check_source(recipe, "model.autoencoder", recipe.model.autoencoder, run.parent)
    trained = finish_run(recipe.model.autoencoder, run.parent, "model.autoencoder")
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
    return Job(method, batch_at, evaluate, asked)


def _autoencoder(recipe: AutoencoderRecipe, run: Path) -> Job:
    device = pick_device(recipe.device)
    images = open_captioned_images(recipe.data, recipe.model.image_size, recipe.gives("model.image_size"))
    torch.manual_seed(recipe.seed)
    model = Autoencoder(build_autoencoder(recipe.model).to(device))
    tell_found(images)
    method = AutoencoderTraining(recipe, model, recipe.num_steps, recipe.batch_size, recipe.seed)
    return Job(method, image_batches(images, recipe))


JOBS: Jobs = {"teach": _pixel_teacher, "teach-text": _text_teacher, "teach-autoencoder": _autoencoder}
