"""The images that a recipe names: an embedded set, files, or latents."""

from dataclasses import fields, replace
from pathlib import Path

from fewstep.data.filters import Filter, load_filtered
from fewstep.data.images import ImageSet, labels_of_classes, load_captioned, load_images
from fewstep.data.latents import LatentSet, is_latents, load_latents, read_description
from fewstep.data.settings import DataSettings
from fewstep.embedded import shapes
from fewstep.embedded.digits import digits
from fewstep.errors import UserError
from fewstep.models.autoencoder import Autoencoder
from fewstep.models.latent_model import LatentModel
from fewstep.models.settings import PixelModelConfig


def open_images(data: DataSettings, model: PixelModelConfig, shrink: bool | None = None) -> ImageSet:
    """The recipe's images, in the model's size, colours and classes; `shrink` as for `load_images`."""
    source, size = required_source(data), model.image_size
    if source == "digits":
        if (model.channels, size) != (1, 8):
            raise UserError(f"data.source: the digits are 1x8x8, the model wants {model.channels}x{size}x{size}")
        images = digits()
        return replace(images, labels=labels_of_classes(images.labels, model.num_classes, source))
    columns = (data.image_column, data.label_column, data.split)
    return load_images(source, size, model.channels, model.num_classes, *columns, shrink)


def open_captioned(
    data: DataSettings, model: LatentModel | Autoencoder, shrink: bool | None = None
) -> ImageSet | LatentSet:
    """The recipe's images with captions, in the model's size, or their latents; `shrink` as for `load_captioned`."""
    if is_latents(source := Path(required_source(data))):
        return load_latents(source, model.latent_space)
    return open_captioned_images(data, model.image_size, shrink)


def open_captioned_images(data: DataSettings, size: int, shrink: bool | None = None) -> ImageSet:
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
    return load_captioned(source, size, data.image_column, data.caption_column, data.split, shrink)


def origin(source: str) -> str:
    """What the images at `source` are: an embedded set, or files by their whole path; of latents, what was encoded."""
    if is_latents(Path(source)):
        source = read_description(Path(source))["source"]
    return source if source in ("digits", "shapes") else str(Path(source).absolute())


def required_source(data: DataSettings) -> str:
    """`data.source`; raises UserError if it is null."""
    if data.source is None:
        raise UserError("data.source: null will do only for text-to-image with prompts and without GAN")
    return data.source
