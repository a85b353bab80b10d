"""Image sets: image folders, EDM zips, parquet files and WebDataset tars, as uint8 tensors."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fewstep.data.edm_zip import is_edm_set, open_edm_set
from fewstep.data.listing import files_digest
from fewstep.data.settings import DataSettings
from fewstep.data.shards import chunks
from fewstep.data.stored import BROKEN, Stored, describe, open_cell
from fewstep.data.tables import open_table, read_captions, read_labels
from fewstep.errors import UserError
from fewstep.seeding import generator

MAX_BYTES_IN_MEMORY = 2 * 2**30  # a set under this is decoded once, a larger one at every access


class Unusable(UserError):
    """One image that can't be used; `reason` is what a report of many counts."""

    def __init__(self, image: str, reason: str):
        super().__init__(f"{image}: {reason}; replace or remove it")
        self.reason = reason


@dataclass(frozen=True)
class ImageSet:
    """Images by index: `fetch` gives uint8 (B, C, H, W) for indices (B,); labels (N,) int64 and captions, or None."""

    fetch: Callable[[Tensor], Tensor]
    labels: Tensor | None
    length: int
    captions: Sequence[str] | None = None
    class_names: Sequence[str] | None = None
    """Of the classes by label, where the source has names for them; a class folder's is its own."""
    found: str | None = None
    """A line that says what was found, where that was asked for."""

    def batch(self, indices: Tensor) -> dict[str, Any]:
        """{"image": (B, C, H, W) uint8}, with "label" (B,) int64 and "caption" (a list) where the set has them."""
        batch: dict[str, Any] = {"image": self.fetch(indices)}
        if self.labels is not None:
            batch["label"] = self.labels[indices]
        if self.captions is not None:
            batch["caption"] = [self.captions[index] for index in indices.tolist()]
        return batch


def load_images(
    data: DataSettings, size: int, channels: int, num_classes: int = 0, shrink: bool | None = None
) -> ImageSet:
    """The images of files: an image folder, an EDM zip, a parquet file, a tar, or a folder of these.

    Images become grey (`channels` 1) or RGB (3), resized by their shorter side and centre-cropped to `size` pixels.
    Labels are read only when `num_classes` > 0. With `shrink`, the set says what was found; False refuses images that
    are larger than `size`. Raises UserError for whatever is wrong with the files.
    """
    path = Path(data.required)
    if is_edm_set(path):
        stored = open_edm_set(path)
        if num_classes and stored.labels is None:
            raise UserError(f"{path}: its dataset.json has no labels, but the model has {num_classes} classes")
    else:
        table, cells = open_table(data)
        stored = Stored(cells, len(table), *read_labels(table, data.label_column, path, num_classes > 0))
    labels = labels_of_classes(stored.labels, num_classes, data.required, stored.class_names)
    return _opened(replace(stored, labels=labels), data.required, size, channels, shrink)


def content_digest(data: DataSettings) -> str | None:
    """16 hex digits that change with the files of the source, not with its place; None of an embedded set."""
    return None if data.source in (None, "digits", "shapes") else files_digest(Path(data.required))


def labels_of_classes(
    labels: Tensor | None, num_classes: int, source: str, names: Sequence[str] | None = None
) -> Tensor | None:
    """The labels if there are classes; raises UserError unless they are 0 .. num_classes-1."""
    if not num_classes or labels is None:
        return None
    found = sorted(set(labels.tolist()))
    if found != list(range(num_classes)):
        named = f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
        has = f"has {len(found)} classes, numbered {found[0]} to {found[-1]}{named}"
        wanted = f"the model has {num_classes}, numbered 0 to {num_classes - 1}"
        raise UserError(f"{source}: {has}, but {wanted} (model.num_classes)")
    return labels


def load_captioned(data: DataSettings, size: int, shrink: bool | None = None) -> ImageSet:
    """RGB images with a caption each, from the files that `load_images` reads; a folder has them in metadata.csv.

    `shrink` as there. Raises UserError for whatever is wrong with the files, and where captions are missing.
    """
    table, cells = open_table(data)
    found = read_captions(table, data.caption_column, Path(data.required))
    captions = [caption for caption in found if caption is not None]
    if len(captions) < len(found):
        raise UserError(f"{data.source}: no caption for {len(found) - len(captions)} of {len(found)} images")
    return _opened(Stored(cells, len(table), captions=captions), data.required, size, 3, shrink)


def _opened(stored: Stored, source: str, size: int, channels: int, shrink: bool | None) -> ImageSet:
    """The images, decoded once if they fit into memory; what is refused is told before that takes its time."""
    found = None if shrink is None else describe(stored, source, size, channels, shrink)
    images = in_memory(decoded(stored, size, channels, Path(source)), channels * size**2, Path(source).name)
    return replace(images, found=found)


def decoded(stored: Stored, size: int, channels: int, path: Path, min_side: int = 0) -> ImageSet:
    """Images decoded at every access; raises Unusable there for those that can't be read or are smaller."""

    def fetch(indices: Tensor) -> Tensor:
        cells = zip(stored.cells(indices.tolist()), indices.tolist(), strict=True)
        return torch.stack([_decode(cell, size, channels, path, row, min_side) for cell, row in cells])

    class_names = None if stored.labels is None else stored.class_names
    return ImageSet(fetch, stored.labels, stored.length, stored.captions, class_names)


def in_memory(images: ImageSet, bytes_per_image: int, name: str) -> ImageSet:
    """The same images decoded once, if they fit into MAX_BYTES_IN_MEMORY."""
    if images.length * bytes_per_image > MAX_BYTES_IN_MEMORY:
        return images
    first = images.fetch(torch.tensor([0]))
    whole = first.new_empty(images.length, *first.shape[1:])
    parts, quiet = chunks(range(images.length), 1000), not sys.stderr.isatty()
    console = Console(stderr=True, quiet=quiet)
    for part in track(parts, f"reading {name}", transient=True, console=console, disable=quiet):
        whole[part.start : part.stop] = images.fetch(torch.tensor(part))
    return replace(images, fetch=whole.__getitem__)


def _decode(cell: Any, size: int, channels: int, source: Path, row: int, min_side: int) -> Tensor:
    """One stored picture as uint8 (C, size, size)."""
    name = f"{source}, row {row}" + (f" ({cell['path']})" if cell and cell["path"] else "")
    try:
        with open_cell(cell) as opened:
            if min(opened.size) < min_side:
                raise Unusable(name, f"smaller than {min_side} pixels")
            if opened.mode[0] in "IF":  # 16 bits or floats, which convert() would clip at 255
                raise ValueError(opened.mode)
            picture = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    except BROKEN as error:
        raise Unusable(name, "not a readable 8-bit image") from error
    fitted = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return pixels.reshape(size, size, channels).permute(2, 0, 1)


@lru_cache(maxsize=4)
def _epoch_order(length: int, seed: int, epoch: int, purpose: str) -> Tensor:
    return torch.randperm(length, generator=generator(seed, purpose, epoch))


def batch_indices(length: int, batch_size: int, step: int, seed: int, purpose: str = "epoch") -> Tensor:
    """The indices (batch_size,) of a step's whole batch, in endless shuffled epochs; each purpose has its own."""
    first, start = divmod(step * batch_size, length)
    epochs = range(first, first - (-(start + batch_size) // length))
    return torch.cat([_epoch_order(length, seed, epoch, purpose) for epoch in epochs])[start : start + batch_size]
