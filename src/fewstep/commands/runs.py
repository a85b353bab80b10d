"""Run folders as the verbs use them: start or resume one, find the model in one."""

import os
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.images import ImageSet, batch_indices, load_captioned, load_images
from fewstep.errors import UserError
from fewstep.networks.latent_model import LatentModel
from fewstep.networks.pixel_model import PixelModel, PixelModelConfig
from fewstep.networks.pretrained import is_loadable, load
from fewstep.recipes.loading import differences, dump, read_run_recipe
from fewstep.recipes.schema import DataSettings, DistillRecipe, TeachRecipe
from fewstep.runtime.checkpoint import RECIPE, check_run, latest_model, write_text
from fewstep.runtime.tracking import Report, progress_bar
from fewstep.training.loop import train
from fewstep.training.method import Method


def pick_device(device: str) -> torch.device:
    """The device of that name; raises UserError if it is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r}: write auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: no CUDA GPU here; use device=cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def open_images(data: DataSettings, model: PixelModelConfig) -> ImageSet:
    """The recipe's images, in the model's size, colours and classes."""
    return load_images(
        data.source,
        model.image_size,
        model.channels,
        model.num_classes,
        data.image_column,
        data.label_column,
        data.split,
    )


def open_captioned(data: DataSettings, model: LatentModel) -> ImageSet:
    """The recipe's images with captions, in the model's size."""
    return load_captioned(data.source, model.image_size, data.image_column, data.caption_column, data.split)


def check_target(run: Path, recipe: TeachRecipe | DistillRecipe, resume: bool) -> None:
    """Raises UserError if the recipe can't start in the folder `run`, or continue there; writes nothing.

    With `resume` a folder that is not there or empty will do, so that one command starts and continues a run.
    """
    check_writable(run)
    occupied = any(run.iterdir()) if run.is_dir() else False
    if occupied and resume:
        check_run(run)
        changed = differences(read_run_recipe(run / RECIPE), recipe)
        if changed:
            raise UserError(
                f"{run}: --resume with a changed recipe ({'; '.join(changed)}); undo that, or choose another --out"
            )
    elif occupied:
        raise UserError(f"{run}: exists already; continue it with --resume, or choose another --out")


def check_writable(folder: Path) -> None:
    """Raises UserError if nothing could be written in `folder`, there or not yet; writes nothing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--out: {nearest} is not a folder that can be written to; choose another")


def start_run(
    method: Method, images: ImageSet, run: Path, recipe: TeachRecipe | DistillRecipe, report: Report | None
) -> None:
    """Makes the run folder and trains; `report` replaces the progress bar."""
    run.mkdir(parents=True, exist_ok=True)
    if not (run / RECIPE).exists():
        write_text(run / RECIPE, dump(recipe))

    def batch_at(step: int) -> dict[str, Tensor]:
        return images.batch(batch_indices(images.length, recipe.batch_size, step, recipe.seed))

    with progress_bar(run.name, recipe.num_steps, report) as show:
        train(method, batch_at, run, recipe, recipe.seed, show)


def open_pixel_model(path: Path) -> PixelModel:
    """The model of a run that can be judged; raises UserError for text-to-image models."""
    model = open_model(path)
    if not isinstance(model, PixelModel):
        raise UserError(f"{path}: a text-to-image model, which can be sampled but not yet evaluated")
    return model


def open_model(
    source: str | Path, config: str | Path | None = None, prediction_type: str | None = None
) -> PixelModel | LatentModel:
    """The image model in the newest checkpoint of a run folder, or what `pretrained.load` finds in `source`."""
    if is_loadable(source):
        return load(source, config, prediction_type)
    return load(latest_model(Path(source)), config, prediction_type)
