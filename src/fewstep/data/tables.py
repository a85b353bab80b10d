"""Files with images as tables: image folders, parquet files, WebDataset tars, read by `datasets`; nothing is run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.settings import DataSettings
from fewstep.data.stored import Cells
from fewstep.errors import UserError

SHARD_SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def open_table(data: DataSettings) -> tuple[Any, Cells]:
    """The table, and its undecoded images by row."""
    from datasets import Image as ImageFeature

    path = Path(data.required)
    table = _open(path, data.split)
    image_column = find_column(table, data.image_column, ("image", "png", "jpg", "jpeg", "webp"), "image_column", path)
    try:
        images = table.select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))
        return table, lambda rows: list(images[rows][image_column])
    except (ValueError, TypeError, NotImplementedError) as error:  # pyarrow's errors are all one of these
        told = f"column {image_column!r} holds no images; name the one that does by data.image_column"
        raise UserError(f"{path}: {told}") from error


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
        told = f"can't be read as {kind}, split {split!r} ({reason})"
        raise UserError(f"{path}: {told} (data.source, data.split)") from error


def _shards(folder: Path, suffix: str) -> dict[str, list[str]]:
    """The files of each split, which `datasets` tells from their names (train-00000.parquet); else all are train."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = str(folder.absolute())
    return dict(DataFilesDict.from_patterns(get_data_patterns(base), base_path=base).filter(extensions=[suffix]))


def _kind(path: Path) -> str:
    """Which `datasets` builder reads `path`."""
    suffixes = {path.suffix.lower()} if path.is_file() else {file.suffix.lower() for file in path.rglob("*")}
    for kind, suffix in SHARD_SUFFIXES.items():
        if suffix in suffixes:
            return kind
    if path.is_dir() and suffixes & IMAGE_SUFFIXES:
        return "imagefolder"
    if path.suffix.lower() == ".zip":
        raise UserError(f"{path}: a zip holds images with classes, as EDM's do; captions come from another source")
    kinds = "a folder of images, a .zip, a .parquet file or a WebDataset .tar"
    raise UserError(f"{path}: no images here; a source is {kinds}")


def find_column(table: Any, wanted: str | None, usual: tuple[str, ...], field: str, path: Path) -> str:
    """The column asked for, or the first usual one; raises UserError that names the setting `field`."""
    names = table.column_names
    if wanted is not None and wanted not in names:
        raise UserError(f"{path}: has no column {wanted!r} (data.{field}); it has {', '.join(names)}")
    found = [wanted] if wanted else [name for name in usual if name in names]
    if not found:
        what = field.removesuffix("_column") + "s"
        otherwise = ", or sort the images into a folder per class" if what == "labels" else ""
        raise UserError(f"{path}: no column of {what} among {', '.join(names)}; name it by data.{field}{otherwise}")
    return found[0]


def read_labels(
    table: Any, label_column: str | None, path: Path, wanted: bool
) -> tuple[Tensor | None, Sequence[str] | None]:
    """Class indices (N,) int64, if they are `wanted`, and the names of the classes, if the table has them."""
    usual = ("label", "labels", "class", "cls")
    if not wanted and not set(usual) & set(table.column_names):
        return None, None
    column = find_column(table, label_column if wanted else None, usual, "label_column", path)
    names = getattr(table.features[column], "names", None)
    if not wanted:
        return None, names
    cells = table[column][:]
    if not all(isinstance(cell, int) and cell >= 0 for cell in cells):
        raise UserError(f"{path}: column {column!r} must hold class indices 0, 1, 2, ... (data.label_column)")
    return torch.tensor(cells, dtype=torch.int64), names


def read_captions(table: Any, caption_column: str | None, path: Path) -> list[str | None]:
    """The captions; None where one is missing or blank."""
    column = find_column(table, caption_column, ("caption", "text", "txt", "prompt"), "caption_column", path)
    return [cell if isinstance(cell, str) and cell.strip() else None for cell in table[column][:]]
