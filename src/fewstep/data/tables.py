"""Files with images, by their kind: folders of images, parquet files, WebDataset tars, EDM's zips; nothing is run."""

import csv
import os
import posixpath
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.data.archives import is_edm_set, open_edm_set, open_tars
from fewstep.data.columns import Stored
from fewstep.data.decoding import Cell
from fewstep.data.listing import METADATA, TEXTS, is_image, list_files, of_split
from fewstep.data.settings import DataSettings
from fewstep.data.texts import MAX_BYTES, as_text, find_column, read_csv, read_jsonl
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
        return _open_folder(path, names, of_split(images, data.split, path))
    kinds = "a folder of images, a .zip, a .parquet file or a WebDataset .tar"
    raise UserError(f"{path}: no images here; a source is {kinds}")


def _open_folder(path: Path, files: Sequence[str], images: Sequence[str]) -> Stored:
    """These images, in their order, of a folder that has these files. Raises UserError for what is wrong with it."""
    columns: dict[str, Callable[[], Sequence[Any]]] = {}
    names, places = {}, {}
    classes = _classes(images)
    if len(known := sorted({name for name in classes if name})) > 1:
        columns["label"] = partial(list, [known.index(name) if name else None for name in classes])
        names["label"] = known
    there, beside = set(files), [name.rpartition(".")[0] for name in images]
    texts = [next((stem + end for end in TEXTS if stem + end in there), None) for stem in beside]
    if any(texts):
        columns["txt"] = lambda: [name and _read_text(path / name) for name in texts]
        places["txt"] = f" of {'/'.join(sorted({Path(name).suffix for name in texts if name}))} files"
    described: dict[str, dict[str, Any]] = {}
    for name in files:
        if name.rpartition("/")[2] in METADATA:
            _describe(described, path, name, there)
            for key in dict.fromkeys(key for row in described.values() for key in row):
                columns[key] = partial(lambda key: [described.get(image, {}).get(key) for image in images], key)
                places[key] = f" of {name.rpartition('/')[2]}"
                names.pop(key, None)
    return Stored(
        path, lambda rows: [Cell(images[row], path / images[row]) for row in rows], len(images), columns, names, places
    )


def _classes(images: Sequence[str]) -> list[str]:
    """The folder that each image lies in; where they lie at several depths, the one right below the source."""
    folders = [name.split("/")[:-1] for name in images]
    at = -1 if len({len(each) for each in folders}) == 1 else 0
    return [each[at] if each else "" for each in folders]


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        return as_text(file.read(MAX_BYTES + 1), path)


def _describe(described: dict[str, dict[str, Any]], path: Path, name: str, there: set[str]) -> None:
    """Adds what a metadata file says of each image; it names images below its folder, and none is opened for it."""
    file, folder = path / name, posixpath.dirname(name)
    try:
        rows = read_csv(file)[1] if name.endswith(".csv") else read_jsonl(file)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: can't be read ({brief(error)})") from error
    for row in rows:
        told = row.pop("file_name", None)
        if not isinstance(told, str):
            raise UserError(f"{file}: a row has no text in the column 'file_name'; it has {', '.join(row) or 'none'}")
        image = posixpath.normpath(posixpath.join(folder, told))
        if image not in there or not is_image(image) or ".." in told.split("/"):
            raise UserError(f"{file}: names {told[:200]!r}, which is no image of this folder")
        if image in described:
            raise UserError(f"{file}: {told} is named twice")
        described[image] = row


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

    others = [name for name in table.column_names if name != image_column]
    columns = {name: partial(lambda name: list(table[name][:]), name) for name in others}
    names = {name: feature.names for name, feature in table.features.items() if getattr(feature, "names", None)}
    return Stored(path, cells, len(table), columns, names)


def _cell(path: str | None = None, bytes: bytes | None = None) -> Cell:
    """A path in a cell is a name only: what it names is opened for nobody."""
    return Cell(path or "", bytes, "names a file and does not hold it" if path else "no picture")
