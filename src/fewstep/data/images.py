"""Image sets: the embedded digits, image folders, parquet files and WebDataset tars, all as uint8 tensors."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from fewstep.errors import UserError
from fewstep.seeding import generator

MAX_BYTES_IN_MEMORY = 2 * 2**30  # a set under this is decoded once, a larger one at every access
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class ImageSet:
    """Images by index: `fetch` gives uint8 (B, C, H, W) for indices (B,); labels (N,) int64 or None."""

    fetch: Callable[[Tensor], Tensor]
    labels: Tensor | None
    length: int

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """{"image": (B, C, H, W) uint8, "label": (B,) int64 where the set has labels}."""
        batch = {"image": self.fetch(indices)}
        return batch if self.labels is None else {**batch, "label": self.labels[indices]}


def digits() -> ImageSet:
    """The 1,797 scanned 8x8 grey digits that scikit-learn carries, 16 levels spread over 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (torch.from_numpy(bunch.images).float() * 255 / 16).round().to(torch.uint8)[:, None]
    return ImageSet(images.__getitem__, torch.from_numpy(bunch.target).long(), len(images))


def load_images(
    source: str,
    size: int,
    channels: int,
    num_classes: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str = "train",
) -> ImageSet:
    """The image set at `source`: "digits", an image folder, a parquet file, a WebDataset tar, or a folder of these.

    Images become grey (`channels` 1) or RGB (3), resized by their shorter side and centre-cropped to `size` pixels.
    Labels are read only when `num_classes` > 0. Raises UserError for whatever is wrong with the files.
    """
    if source == "digits":
        images = digits()
        _check_shape(images, size, channels)
    else:
        images = _from_files(Path(source), size, channels, num_classes > 0, image_column, label_column, split)
    return _check_classes(images, num_classes, source)


def _check_shape(images: ImageSet, size: int, channels: int) -> None:
    if (channels, size, size) != tuple(images.fetch(torch.tensor([0])).shape[1:]):
        raise UserError(f"data.source: the digits are 1x8x8, the model wants {channels}x{size}x{size}")


def _check_classes(images: ImageSet, num_classes: int, source: str) -> ImageSet:
    if not num_classes:
        return ImageSet(images.fetch, None, images.length)
    if images.labels is None:
        raise UserError(f"{source}: has no labels, but the model has {num_classes} classes; name data.label_column")
    found = int(images.labels.max()) + 1
    if found != num_classes:
        raise UserError(f"{source}: has {found} classes, but the model has {num_classes}")
    return images


def _from_files(
    path: Path, size: int, channels: int, labelled: bool, image_column: str | None, label_column: str | None, split: str
) -> ImageSet:
    from datasets import Image as ImageFeature

    table = _open(path, split)
    image_column = _column(table, image_column, ("image", "png", "jpg", "jpeg", "webp"), "image_column", path)
    table = table.cast_column(image_column, ImageFeature(decode=False))
    labels = _labels(table, label_column, path) if labelled else None
    pictures = table.select_columns([image_column]).with_format(None)

    def fetch(indices: Tensor) -> Tensor:
        rows = indices.tolist()
        cells = pictures[rows][image_column]
        return torch.stack([_decode(cell, size, channels, path, row) for cell, row in zip(cells, rows, strict=True)])

    if len(table) * channels * size**2 > MAX_BYTES_IN_MEMORY:
        return ImageSet(fetch, labels, len(table))
    chunks = track(torch.arange(len(table)).split(1000), description=f"reading {path.name}", transient=True)
    return ImageSet(torch.cat([fetch(chunk) for chunk in chunks]).__getitem__, labels, len(table))


def _open(path: Path, split: str) -> Any:
    """A `datasets.Dataset` of one kind of file; datasets caches what it converts, nothing is run."""
    import datasets

    datasets.disable_progress_bars()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (data.source)")
    kind, files = _kind(path)
    try:
        if kind == "imagefolder":
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=split)
        return datasets.load_dataset(kind, data_files={split: files}, split=split)
    except Exception as error:  # the builders raise almost any error on damaged files
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{path}: can't be read as {kind} ({reason})") from error


def _kind(path: Path) -> tuple[str, list[str]]:
    """Which `datasets` builder reads `path`, and which files it gets."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    for kind, suffixes in (("parquet", {".parquet"}), ("webdataset", {".tar"}), ("imagefolder", IMAGE_SUFFIXES)):
        found = [str(file) for file in files if file.suffix.lower() in suffixes]
        if found and not (kind == "imagefolder" and path.is_file()):
            return kind, found
    raise UserError(f"{path}: no images here; a source is a folder of images, a .parquet file or a WebDataset .tar")


def _column(table: Any, wanted: str | None, usual: tuple[str, ...], field: str, path: Path) -> str:
    names = table.column_names
    if wanted is not None and wanted not in names:
        raise UserError(f"{path}: has no column {wanted!r} (data.{field}); it has {', '.join(names)}")
    found = [wanted] if wanted else [name for name in usual if name in names]
    if not found:
        raise UserError(f"{path}: which column holds the images or labels? It has {', '.join(names)}; set data.{field}")
    return found[0]


def _labels(table: Any, label_column: str | None, path: Path) -> Tensor:
    column = _column(table, label_column, ("label", "labels", "class", "cls"), "label_column", path)
    try:
        return torch.tensor(table[column][:], dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: column {column!r} holds no class indices (data.label_column)") from error


def _decode(cell: dict, size: int, channels: int, source: Path, row: int) -> Tensor:
    """One stored picture as uint8 (C, size, size)."""
    try:
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]) as opened:
            picture = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{cell.get('path') or f'{source}, row {row}'}: not a readable image") from error
    fitted = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return pixels.reshape(size, size, channels).permute(2, 0, 1)


@lru_cache(maxsize=2)
def _epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(length, generator=generator(seed, "epoch", epoch))


def batch_indices(length: int, batch_size: int, step: int, seed: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """The indices (batch_size,) that `rank` sees at `step`, in endless shuffled epochs."""
    start = (step * world_size + rank) * batch_size
    positions = torch.arange(start, start + batch_size)
    epochs = positions // length
    orders = [
        _epoch_order(length, seed, epoch)[positions[epochs == epoch] % length] for epoch in epochs.unique().tolist()
    ]
    return torch.cat(orders)
