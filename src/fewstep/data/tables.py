"""Files with images, by their kind: folders of images, parquet files, WebDataset tars, EDM's zips; nothing is run."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.data.archives import open_tars
from fewstep.data.columns import Stored
from fewstep.data.decoding import Cell
from fewstep.data.edm_zip import is_edm_set, open_edm_set
from fewstep.data.folders import open_folder
from fewstep.data.listing import is_image, list_files, of_split
from fewstep.data.settings import DataSettings
from fewstep.data.texts import find_column
from fewstep.errors import UserError, brief

USUAL = ("image", "png", "jpg", "jpeg", "webp", "img")


def open_stored(data: DataSettings) -> Stored:
    """The undecoded images at `data.source`, and the columns beside them; raises UserError for what is wrong."""
    path = Path(data.required)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder (data.source)")
    if is_edm_set(path):
        return open_edm_set(path)
    names = list_files(path) if path.is_dir() else [path.name] if path.is_file() else []
    for suffix, open_shards in ((".parquet", _open_parquet), (".tar", open_tars)):
        if shards := [name for name in names if name.lower().endswith(suffix)]:
            files = [path] if path.is_file() else [path / name for name in of_split(shards, data.split, path)]
            return open_shards(path, files, data.image_column)
    if path.is_dir() and (images := [name for name in names if is_image(name)]):
        return open_folder(path, names, of_split(images, data.split, path))
    kinds = "a folder of images, a .zip, a .parquet file or a WebDataset .tar"
    raise UserError(f"{path}: no images here; a source is {kinds}")


def _open_parquet(path: Path, files: Sequence[Path], image_column: str | None) -> Stored:
    """By `datasets`, which keeps an uncompressed copy, so that any row is read alone; its paths would be patterns."""
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.parquet.parquet import Parquet

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error that is raised here
    whole = [str(file.absolute()) for file in files]
    origins = [(str(os.stat(file).st_mtime_ns), str(os.path.getsize(file))) for file in files]
    try:
        literal = DataFilesDict({"train": DataFilesList(whole, origins)})
        builder = Parquet(data_files=literal, batch_size=100)
        builder.download_and_prepare()
        table = builder.as_dataset("train")
    except Exception as error:  # the builder raises almost any error on damaged files
        reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise UserError(f"{path}: can't be read as parquet ({brief(reason)}) (data.source)") from error
    image_column = find_column(table.column_names, image_column, USUAL, "images", "data.image_column", path)
    try:
        images = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except (ValueError, TypeError, NotImplementedError) as error:  # pyarrow's errors are all one of these
        told = f"column {image_column!r} holds no images; name the one that does by data.image_column"
        raise UserError(f"{path}: {told}") from error

    def cells(rows: list[int]) -> list[Cell]:
        return [_cell(**(each or {})) for each in images[rows][image_column]]

    columns = {name: partial(_column, table, name) for name in table.column_names if name != image_column}
    names = {name: feature.names for name, feature in table.features.items() if getattr(feature, "names", None)}
    return Stored(path, cells, len(table), columns, names)


def _cell(path: str | None = None, bytes: bytes | None = None) -> Cell:
    """A path in a cell is a name only: what it names is opened for nobody."""
    return Cell(path or "", bytes, "names a file and does not hold it" if path else "no picture")


def _column(table: Any, name: str) -> list[Any]:
    return list(table[name][:])
