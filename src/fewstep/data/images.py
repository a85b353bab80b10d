"""Image sets: image folders, EDM zips, parquet files and WebDataset tars, as uint8 tensors."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fewstep.data.columns import LABELS, Stored
from fewstep.data.decoding import decode
from fewstep.data.listing import files_digest
from fewstep.data.settings import DataSettings
from fewstep.data.shards import chunks
from fewstep.data.stored import describe
from fewstep.data.tables import open_stored
from fewstep.data.texts import some
from fewstep.errors import UserError
from fewstep.seeding import generator

Names = Sequence[str] | None
MAX_BYTES_IN_MEMORY = 2 * 2**30  # a set under this is decoded once, a larger one at every access


@dataclass(frozen=True)
class ImageSet:
    """Images by index: `fetch` gives uint8 (B, C, H, W) for indices (B,); labels (N,) int64 and captions, or None."""

    fetch: Callable[[Tensor], Tensor]
    labels: Tensor | None
    length: int
    captions: Sequence[str] | None = None
    class_names: Names = None
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
    data: DataSettings,
    size: int,
    channels: int,
    num_classes: int = 0,
    shrink: bool | None = None,
    model_names: Names = None,
    whole: bool = True,
    in_memory: int | None = None,
) -> ImageSet:
    """The images of files: an image folder, an EDM zip, a parquet file, a tar, or a folder of these.

    Images become grey (`channels` 1) or RGB (3), resized by their shorter side and centre-cropped to `size` pixels.
    Labels are read only when `num_classes` > 0, by name where the model has `model_names`; unless the set must be
    `whole`, some classes will do. With `shrink`, the set says what was found; False refuses images that are larger than
    `size`. A set of up to `in_memory` bytes (2 GiB) is decoded once. Raises UserError for what is wrong with the files.
    """
    stored = open_stored(data)
    unused = next((stored.names[name] for name in LABELS if name in stored.names), None)
    stored = stored.with_labels(data.label_column) if num_classes else replace(stored, class_names=unused)
    named = labels_of_classes(stored.labels, stored.class_names, num_classes, model_names, whole, data.required)
    stored = replace(stored, labels=named[0], class_names=named[1])
    return _opened(stored, data, size, channels, shrink, num_classes, in_memory)


def content_digest(data: DataSettings) -> str | None:
    """16 hex digits that change with the files of the source, not with its place; None of an embedded set."""
    return None if data.source in (None, "digits", "shapes") else files_digest(Path(data.required))


def labels_of_classes(
    labels: Tensor | None, names: Names, num_classes: int, model_names: Names, whole: bool, source: str
) -> tuple[Tensor | None, Names]:
    """The labels as the model numbers its classes, by their names where both have some, and the names.

    Raises UserError unless the images have all of its classes or, but for a `whole` set, some of them.
    """
    if labels is None or not num_classes:
        return None, names
    if names and model_names and set(names) <= set(model_names):
        return torch.tensor([list(model_names).index(name) for name in names])[labels], model_names
    numbered = all(name.isdecimal() and len(name) < 10 for name in names or ())
    part = not whole and (model_names or len(names or ()) < num_classes <= 10)  # beyond it 10 is sorted before 2
    if names and numbered and part:
        labels, names = torch.tensor([int(name) for name in names])[labels], model_names
    found = sorted(set(labels.tolist()))
    told = f" ({some(names)})" if names else ""
    has = f"{source}: has {len(found)} classes, numbered {found[0]} to {found[-1]}{told}"
    if names and model_names and list(names) != list(model_names):
        raise UserError(f"{has}, but those of the model are {some(model_names)} (data.source)")
    if found[-1] >= num_classes or (len(found) < num_classes and (whole or (names and not model_names))):
        raise UserError(f"{has}, but the model has {num_classes}, numbered 0 to {num_classes - 1} (model.num_classes)")
    return labels, names or model_names


def load_captioned(data: DataSettings, size: int, shrink: bool | None = None, in_memory: int | None = None) -> ImageSet:
    """RGB images with a caption each, from the files that `load_images` reads; `shrink` and `in_memory` as there.

    Raises UserError for whatever is wrong with the files, and where captions are missing.
    """
    stored = open_stored(data).with_captions(data.caption_column)
    lacking = [row for row, caption in enumerate(stored.captions or ()) if caption is None]
    if lacking:
        name = stored.cells(lacking[:1])[0].name
        raise UserError(f"{data.source}: no caption for {len(lacking)} of {stored.length} images, such as {name}")
    return _opened(stored, data, size, 3, shrink, in_memory=in_memory)


def _opened(
    stored: Stored,
    data: DataSettings,
    size: int,
    channels: int,
    shrink: bool | None,
    num_classes: int = 0,
    in_memory: int | None = None,
) -> ImageSet:
    """The images, decoded once if they fit into memory; what is refused is told before that takes its time."""
    found = None if shrink is None else describe(stored, data, size, channels, shrink, num_classes)
    images = replace(decoded(stored, data, size, channels), found=found)
    if images.length * channels * size**2 > (MAX_BYTES_IN_MEMORY if in_memory is None else in_memory):
        return images
    whole, quiet = torch.empty(images.length, channels, size, size, dtype=torch.uint8), not sys.stderr.isatty()
    told, console = f"reading {Path(data.required).name}", Console(stderr=True, quiet=quiet)
    parts = chunks(range(images.length), 1000)
    for part in track(parts, told, transient=True, console=console, disable=quiet):
        whole[part.start : part.stop] = images.fetch(torch.tensor(part))
    return replace(images, fetch=whole.__getitem__)


def decoded(stored: Stored, data: DataSettings, size: int, channels: int, min_side: int = 0) -> ImageSet:
    """Images decoded at every access; raises Unusable there for those that can't be read or are smaller."""

    def fetch(indices: Tensor) -> Tensor:
        rows, where = indices.tolist(), f"{Path(data.required)}, row"
        cells, how = zip(rows, stored.cells(rows), strict=True), (size, channels, data.background, min_side)
        return torch.stack([decode(cell, f"{where} {row}", *how) for row, cell in cells])

    class_names = None if stored.labels is None else stored.class_names
    captions = None if stored.captions is None else [caption or "" for caption in stored.captions]
    return ImageSet(fetch, stored.labels, stored.length, captions, class_names)


@lru_cache(maxsize=4)
def _epoch_order(length: int, seed: int, epoch: int, purpose: str) -> Tensor:
    return torch.randperm(length, generator=generator(seed, purpose, epoch))


def batch_indices(length: int, batch_size: int, step: int, seed: int, purpose: str = "epoch") -> Tensor:
    """The indices (batch_size,) of a step's whole batch, in endless shuffled epochs; each purpose has its own."""
    first, start = divmod(step * batch_size, length)
    epochs = range(first, first - (-(start + batch_size) // length))
    return torch.cat([_epoch_order(length, seed, epoch, purpose) for epoch in epochs])[start : start + batch_size]
