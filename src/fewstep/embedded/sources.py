"""The images that a recipe names: an embedded set, files, or latents."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from fewstep.data.filters import Filter, load_filtered
from fewstep.data.images import ImageSet, labels_of_classes, load_captioned, load_images
from fewstep.data.latents import LatentSet, is_latents, load_latents, read_description
from fewstep.data.settings import DataSettings
from fewstep.embedded import shapes
from fewstep.errors import UserError
from fewstep.models.autoencoder import Autoencoder
from fewstep.models.image_model import ImageModel
from fewstep.models.latent_model import LatentModel
from fewstep.networks.settings import PixelModelConfig


def digits() -> ImageSet:
    """The smallest real image set: the 1,797 8x8 grey digits that scikit-learn carries, 16 levels over 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (torch.from_numpy(bunch.images).float() * 255 / 16).round().to(torch.uint8)[:, None]
    return ImageSet(images.__getitem__, torch.from_numpy(bunch.target).long(), len(images))


@dataclass(frozen=True)
class Pictures:
    """What images are made into where no model says it: of so many pixels a side, grey (1) or RGB (3), of classes."""

    image_size: int
    channels: int
    num_classes: int = 0
    class_names: Sequence[str] | None = None
    device: torch.device | str = "cpu"
    """Of what judges them."""


def open_images(
    data: DataSettings,
    model: PixelModelConfig | ImageModel | Pictures,
    shrink: bool | None = None,
    in_memory: int | None = None,
) -> ImageSet:
    """The recipe's images, in the model's size, colours and classes; `shrink` and `in_memory` as for `load_images`.

    A model that is yet to be taught needs images of all classes; of a given one's some will do.
    """
    size, names, whole = model.image_size, getattr(model, "class_names", None), isinstance(model, PixelModelConfig)
    if data.source != "digits":
        return load_images(data, size, model.channels, model.num_classes, shrink, names, whole, in_memory)
    if (model.channels, size) != (1, 8):
        raise UserError(f"data.source: the digits are 1x8x8, the model wants {model.channels}x{size}x{size}")
    images = digits()
    labels, _ = labels_of_classes(images.labels, None, model.num_classes, names, True, "digits")
    return replace(images, labels=labels)


def open_captioned(
    data: DataSettings, model: LatentModel | Autoencoder, shrink: bool | None = None
) -> ImageSet | LatentSet:
    """The recipe's images with captions, in the model's size, or their latents; `shrink` as for `load_captioned`."""
    if is_latents(source := Path(data.required)):
        return load_latents(source, model.latent_space)
    return open_captioned_images(data, model.image_size, shrink)


def open_captioned_images(
    data: DataSettings, size: int, shrink: bool | None = None, in_memory: int | None = None
) -> ImageSet:
    """The recipe's images with captions; where it names latents, the images that those were made of.

    Of these, what could not be read or was too small for the latents shows itself where it is fetched, by Unusable.
    """
    made = read_description(Path(data.required))
    if "shapes" in (data.source, made.get("source")):
        if size != shapes.IMAGE_SIZE:
            raise UserError(f"data.source: the shapes have {shapes.IMAGE_SIZE} pixels, the model {size}")
        return shapes.shapes()
    if made:
        names = ("source", "image_column", "caption_column", "split", "background")
        data = DataSettings(**{name: made[name] for name in names if name in made})
        return load_filtered(data, size, Filter(**{field.name: made[field.name] for field in fields(Filter)}))[0]
    return load_captioned(data, size, shrink, in_memory)


def origin(source: str) -> str:
    """What the images at `source` are: an embedded set, or files by their whole path; of latents, what was encoded."""
    source = read_description(Path(source)).get("source", source)
    return source if source in ("digits", "shapes") else str(Path(source).absolute())
