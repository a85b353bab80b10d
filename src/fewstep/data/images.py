"""Image sets: the embedded digits, image folders, parquet files and WebDataset tars, all as uint8 tensors."""

import io
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

from fewstep.errors import UserError
from fewstep.seeding import generator

MAX_BYTES_IN_MEMORY = 2 * 2**30  # a set under this is decoded once, a larger one at every access
SHARD_SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class ImageSet:
    """Images by index: `fetch` gives uint8 (B, C, H, W) for indices (B,); labels (N,) int64 and captions, or None."""

    fetch: Callable[[Tensor], Tensor]
    labels: Tensor | None
    length: int
    captions: Sequence[str] | None = None

    def batch(self, indices: Tensor) -> dict[str, Any]:
        """{"image": (B, C, H, W) uint8}, with "label" (B,) int64 and "caption" (a list) where the set has them."""
        batch: dict[str, Any] = {"image": self.fetch(indices)}
        if self.labels is not None:
            batch["label"] = self.labels[indices]
        if self.captions is not None:
            batch["caption"] = [self.captions[index] for index in indices.tolist()]
        return batch


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
    if not num_classes or images.labels is None:
        return ImageSet(images.fetch, None, images.length)
    found = images.labels.unique().tolist()
    if found != list(range(num_classes)):
        raise UserError(
            f"{source}: has {len(found)} classes, numbered {found[0]} to {found[-1]}, but the model has {num_classes}, "
            f"numbered 0 to {num_classes - 1} (model.num_classes)"
        )
    return images


def load_captioned(
    source: str, size: int, image_column: str | None = None, caption_column: str | None = None, split: str = "train"
) -> ImageSet:
    """RGB images with a caption each, from the files that `load_images` reads; a folder has them in metadata.csv.

    Raises UserError for whatever is wrong with the files, and where captions are missing.
    """
    table, image_column = _open_table(Path(source), split, image_column)
    captions = _captions(table, caption_column, Path(source))
    return replace(_pictures(table, image_column, size, 3, Path(source)), captions=captions)


def _from_files(
    path: Path, size: int, channels: int, labelled: bool, image_column: str | None, label_column: str | None, split: str
) -> ImageSet:
    table, image_column = _open_table(path, split, image_column)
    labels = _labels(table, label_column, path) if labelled else None
    return replace(_pictures(table, image_column, size, channels, path), labels=labels)


def _open_table(path: Path, split: str, image_column: str | None) -> tuple[Any, str]:
    """The table with its images as undecoded bytes, and the name of their column."""
    from datasets import Image as ImageFeature

    table = _open(path, split)
    image_column = _column(table, image_column, ("image", "png", "jpg", "jpeg", "webp"), "image_column", path)
    try:
        return table.cast_column(image_column, ImageFeature(decode=False)), image_column
    except (ValueError, TypeError, NotImplementedError) as error:  # pyarrow's errors are all one of these
        raise UserError(
            f"{path}: column {image_column!r} holds no images; name the one that does by data.image_column"
        ) from error


def _pictures(table: Any, image_column: str, size: int, channels: int, path: Path) -> ImageSet:
    """The images alone, in memory if they fit."""
    pictures = table.select_columns([image_column]).with_format(None)

    def fetch(indices: Tensor) -> Tensor:
        rows = indices.tolist()
        cells = pictures[rows][image_column]
        return torch.stack([_decode(cell, size, channels, path, row) for cell, row in zip(cells, rows, strict=True)])

    if len(table) * channels * size**2 > MAX_BYTES_IN_MEMORY:
        return ImageSet(fetch, None, len(table))
    chunks = track(
        torch.arange(len(table)).split(1000),
        description=f"reading {path.name}",
        transient=True,
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    return ImageSet(torch.cat([fetch(chunk) for chunk in chunks]).__getitem__, None, len(table))


def _open(path: Path, split: str) -> Any:
    """A `datasets.Dataset` of one kind of file; datasets caches what it converts, nothing is run."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error that is raised here
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (data.source)")
    kind = _kind(path)
    try:
        if kind == "imagefolder":
            return datasets.load_dataset(kind, data_dir=str(path), split=split)
        files = {split: [str(path)]} if path.is_file() else _shards(path, SHARD_SUFFIXES[kind])
        return datasets.load_dataset(kind, data_files=files, split=split)
    except Exception as error:  # the builders raise almost any error on damaged files
        reason = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: can't be read as {kind}, split {split!r} ({reason}) (data.source, data.split)"
        ) from error


def _shards(folder: Path, suffix: str) -> dict[str, list[str]]:
    """The files of each split, which `datasets` tells from their names (train-00000.parquet); else all are train."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = str(folder.absolute())
    return DataFilesDict.from_patterns(get_data_patterns(base), base_path=base).filter(extensions=[suffix])


def _kind(path: Path) -> str:
    """Which `datasets` builder reads `path`."""
    suffixes = {path.suffix.lower()} if path.is_file() else {file.suffix.lower() for file in path.rglob("*")}
    for kind, suffix in SHARD_SUFFIXES.items():
        if suffix in suffixes:
            return kind
    if path.is_dir() and suffixes & IMAGE_SUFFIXES:
        return "imagefolder"
    raise UserError(f"{path}: no images here; a source is a folder of images, a .parquet file or a WebDataset .tar")


def _column(table: Any, wanted: str | None, usual: tuple[str, ...], field: str, path: Path) -> str:
    names = table.column_names
    if wanted is not None and wanted not in names:
        raise UserError(f"{path}: has no column {wanted!r} (data.{field}); it has {', '.join(names)}")
    found = [wanted] if wanted else [name for name in usual if name in names]
    if not found:
        what = field.removesuffix("_column") + "s"
        otherwise = ", or sort the images into a folder per class" if what == "labels" else ""
        raise UserError(f"{path}: no column of {what} among {', '.join(names)}; name it by data.{field}{otherwise}")
    return found[0]


def _labels(table: Any, label_column: str | None, path: Path) -> Tensor:
    column = _column(table, label_column, ("label", "labels", "class", "cls"), "label_column", path)
    cells = table[column][:]
    if not all(isinstance(cell, int) and cell >= 0 for cell in cells):
        raise UserError(f"{path}: column {column!r} must hold class indices 0, 1, 2, ... (data.label_column)")
    return torch.tensor(cells, dtype=torch.int64)


def _captions(table: Any, caption_column: str | None, path: Path) -> list[str]:
    column = _column(table, caption_column, ("caption", "text", "txt", "prompt"), "caption_column", path)
    captions = table[column][:]
    missing = sum(not isinstance(caption, str) or not caption.strip() for caption in captions)
    if missing:
        raise UserError(f"{path}: column {column!r} has no caption for {missing} of {len(captions)} images")
    return captions


def _decode(cell: Any, size: int, channels: int, source: Path, row: int) -> Tensor:
    """One stored picture as uint8 (C, size, size)."""
    try:
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]) as opened:
            if opened.mode[0] in "IF":  # 16 bits or floats, which convert() would clip at 255
                raise ValueError(opened.mode)
            picture = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        name = f"{source}, row {row}" + (f" ({cell['path']})" if cell and cell["path"] else "")
        raise UserError(f"{name}: not a readable 8-bit image; replace or remove it") from error
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
