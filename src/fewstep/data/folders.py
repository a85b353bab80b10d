"""Folders of images: their classes by their folders, their captions in metadata.csv, metadata.jsonl or beside them."""

import csv
import posixpath
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.data.columns import Stored
from fewstep.data.decoding import Cell
from fewstep.data.listing import METADATA, TEXTS, is_image
from fewstep.data.texts import MAX_BYTES, as_text, read_csv, read_jsonl
from fewstep.errors import UserError, brief


def open_folder(path: Path, files: Sequence[str], images: Sequence[str]) -> Stored:
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
                columns[key] = partial(_column, described, images, key)
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


def _column(described: dict[str, dict[str, Any]], images: Sequence[str], key: str) -> list[Any]:
    return [described.get(name, {}).get(key) for name in images]


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
