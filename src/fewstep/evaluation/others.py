"""Images that something else made: folders, parquet files, tars and zips of them, which models are judged beside."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.columns import CAPTIONS
from fewstep.data.images import ImageSet, decoded
from fewstep.data.listing import is_image, list_files
from fewstep.data.settings import DataSettings
from fewstep.data.stored import colours_and_size
from fewstep.data.tables import open_stored
from fewstep.embedded.sources import Pictures, origin
from fewstep.errors import UserError
from fewstep.evaluation import reference
from fewstep.evaluation.gathering import GRID_IMAGES, MAX_KEPT
from fewstep.models.image_model import Asked

SUFFIXES = (".parquet", ".tar", ".zip")


@dataclass(frozen=True)
class Others:
    """Some of a source's images: number i of a row is image `order[i]`, with its prompt where there are prompts."""

    source: str
    images: ImageSet
    order: Tensor  # (num,)
    prompts: Sequence[str]

    def draw(self, numbers: range, asked: Asked = None) -> Iterator[Tensor]:
        """uint8 images (B, C, H, W), as `generate_batches` gives those of a model."""
        return (self.images.fetch(part) for part in self.order[numbers.start : numbers.stop].split(reference.FETCH))

    @property
    def identity(self) -> str:
        """A hash of the files and of what is taken of them."""
        return reference.identity(self.images, DataSettings(source=self.source))


def is_images(text: str) -> bool:
    """Whether there are images at a path."""
    path = Path(text)
    if not path.is_dir():
        return path.is_file() and path.suffix.lower() in SUFFIXES
    return any(is_image(name) or name.lower().endswith(SUFFIXES) for name in list_files(path))


def pictures_at(source: str, size: int | None) -> Pictures:
    """What images at a source are, in `size` pixels or, where all that are looked at are one square's, in theirs."""
    sizes, grey = colours_and_size(open_stored(DataSettings(source=source)))
    (width, height), *others = sizes or [(0, 0)]
    if size is None and (others or width != height or not width):
        raise UserError(f"{source}: has images of {len(sizes)} sizes or no squares; say with --size what all are made")
    return Pictures(size or width, 1 if grey else 3)


def check_pictures(source: str, pictures: Pictures, size: int | None, whose: str) -> None:
    """Raises UserError unless images at a source have the size, where none is asked for, and colours of `whose`."""
    if source in ("digits", "shapes") or origin(source) in ("digits", "shapes"):
        return
    sizes, grey = colours_and_size(open_stored(DataSettings(source=source)))
    own = pictures.image_size
    if other := next((each for each in sizes if size is None and each != (own, own)), None):
        told = f"has images of {other[0]}x{other[1]}, but those of {whose} have {own}x{own}"
        raise UserError(f"{source}: {told}; say with --size what all are brought to, for example --size {own}")
    if sizes and grey != (pictures.channels == 1):
        kinds = ("grey", "RGB") if grey else ("RGB", "grey")
        raise UserError(f"{source}: its images are {kinds[0]}, but those of {whose} are {kinds[1]}; make them alike")


def open_others(source: str, pictures: Pictures, num: int, prompts: Sequence[str]) -> Others:
    """At most `num` images, all in their order or a random part of them, in the size and colours of `pictures`.

    Their prompts are those given, in the order of the files' names, else the captions that stand beside all of them.
    Raises UserError if there are too few, or as many prompts as do not divide them.
    """
    data = DataSettings(source=source)
    stored = open_stored(data)
    if stored.length < GRID_IMAGES:
        raise UserError(f"{source}: has {stored.length} images; judging needs at least {GRID_IMAGES}")
    if prompts and stored.length % len(prompts):
        told = f"has {stored.length} images, which {len(prompts)} prompts (--prompts) do not divide"
        raise UserError(f"{source}: {told}; give as many as there are images, or images for all of them in turn")
    if not prompts and stored.has(CAPTIONS):
        captions = stored.with_captions(None).captions or []
        prompts = [caption for caption in captions if caption is not None]
        prompts = prompts if len(prompts) == len(captions) else []
    images = decoded(stored, data, pictures.image_size, pictures.channels)
    order = torch.arange(stored.length) if stored.length <= min(num, MAX_KEPT) else reference.random_order(images)[:num]
    asked = [prompts[index % len(prompts)] for index in order.tolist()] if prompts else []
    return Others(source, images, order, asked)
