"""Run folders as the verbs use them: start or resume one, find the model in one."""

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from fewstep.data import shapes
from fewstep.data.filters import Filter, load_filtered
from fewstep.data.images import ImageSet, batch_indices, load_captioned, load_images
from fewstep.data.latents import LatentSet, is_latents, load_latents, read_description
from fewstep.errors import UserError
from fewstep.networks.autoencoder import Autoencoder
from fewstep.networks.latent_model import LatentModel
from fewstep.networks.pixel_model import PixelModel, PixelModelConfig
from fewstep.networks.pretrained import is_loadable, load
from fewstep.recipes.loading import differences, dump, read_run_recipe
from fewstep.recipes.schema import AnyRecipe, DataSettings
from fewstep.runtime.checkpoint import RECIPE, check_run, write_text
from fewstep.runtime.selection import find_checkpoint, find_model, other_emas
from fewstep.runtime.tracking import Report, progress_bar
from fewstep.training.loop import Evaluate, train
from fewstep.training.method import Batch, Method

FROZEN = "frozen"  # folder of a run: the autoencoder and the text encoders, which its checkpoints link to


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
        required_source(data),
        model.image_size,
        model.channels,
        model.num_classes,
        data.image_column,
        data.label_column,
        data.split,
    )


def open_captioned(data: DataSettings, model: LatentModel | Autoencoder) -> ImageSet | LatentSet:
    """The recipe's images with captions, in the model's size, or their latents."""
    if is_latents(source := Path(required_source(data))):
        return load_latents(source, model.latent_space)
    return open_captioned_images(data, model.image_size)


def open_captioned_images(data: DataSettings, size: int) -> ImageSet:
    """The recipe's images with captions; where it names latents, the images that those were made of.

    Of these, what could not be read or was too small for the latents shows itself where it is fetched, by Unusable.
    """
    source, made = required_source(data), None
    if is_latents(Path(source)):
        made = read_description(Path(source))
        source = made["source"]
    if source == "shapes":
        if size != shapes.IMAGE_SIZE:
            raise UserError(f"data.source: the shapes have {shapes.IMAGE_SIZE} pixels, the model {size}")
        return shapes.shapes()
    if made:
        kept = Filter(**{field.name: made[field.name] for field in fields(Filter)})
        return load_filtered(source, size, kept, made["image_column"], made["caption_column"], made["split"])[0]
    return load_captioned(source, size, data.image_column, data.caption_column, data.split)


def required_source(data: DataSettings) -> str:
    """`data.source`; raises UserError if it is null."""
    if data.source is None:
        raise UserError("data.source: null will do only for text-to-image with prompts and without GAN")
    return data.source


def check_target(run: Path, recipe: AnyRecipe, resume: bool) -> None:
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


def image_batches(images: ImageSet, recipe: AnyRecipe) -> Callable[[int], Batch]:
    """The batch of every step: real images with their labels."""
    return lambda step: images.batch(batch_indices(images.length, recipe.batch_size, step, recipe.seed))


def start_run(
    method: Method,
    batch_at: Callable[[int], Batch],
    evaluate: Evaluate | None,
    run: Path,
    recipe: AnyRecipe,
    report: Report | None,
) -> None:
    """Makes the run folder and trains on `batch_at(step)`; `report` replaces the progress bar."""
    run.mkdir(parents=True, exist_ok=True)
    if not (run / RECIPE).exists():
        write_text(run / RECIPE, dump(recipe))
    with progress_bar(run.name, recipe.num_steps, report) as show:
        train(method, batch_at, run, recipe, recipe.seed, show, evaluate)


def open_model(
    source: str | Path, config: str | Path | None = None, prediction_type: str | None = None
) -> PixelModel | LatentModel:
    """What `pretrained.load` finds in `source`, or the image model of RUN, RUN@STEP or RUN@best-METRIC."""
    if is_loadable(source):
        return load(source, config, prediction_type)
    return load(find_model(str(source)), config, prediction_type)


def open_averages(source: str | Path) -> dict[str, PixelModel | LatentModel]:
    """The image model in `source` as "", and of a run the other averages of its checkpoint as " ema0.99995"."""
    if is_loadable(source):
        return {"": load(source)}
    checkpoint = find_checkpoint(str(source))
    others = {f" ema{ema}": load(folder) for ema, folder in other_emas(checkpoint).items()}
    return {"": load(checkpoint / "model"), **others}
