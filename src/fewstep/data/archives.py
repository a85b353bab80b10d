"""WebDataset tars: an index of their members, of which images and texts are read when they are asked for."""

import posixpath
import tarfile
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.columns import Stored
from fewstep.data.decoding import MAX_BYTES as MAX_PICTURE
from fewstep.data.decoding import Cell
from fewstep.data.listing import IMAGES, TEXTS, is_hidden, is_image
from fewstep.data.texts import MAX_BYTES, as_object, as_text
from fewstep.errors import UserError, brief

SUFFIXES = {*IMAGES, *TEXTS, ".json", ".cls"}


def open_tars(path: Path, files: Sequence[Path], image_column: str | None) -> Stored:
    """The samples with an image, in their order: what has one name and the usual ends, `.seg.png` among them.

    A name is split at the usual end, so it may hold dots. Raises UserError if a file can't be read as a tar.
    """
    keys: list[str] = []
    members: dict[str, array[int]] = {}  # by end, of every sample: number of the tar, offset, size; no object per image
    for number, file in enumerate(files):
        for key, sample in _samples(file).items():
            for end, place in sample.items():
                column = members.setdefault(end, array("q"))
                column.extend((*[-1] * (3 * len(keys) - len(column)), number, *place))
            keys.append(key)
    whole = {end: (*column, *[-1] * (3 * len(keys) - len(column))) for end, column in members.items()}
    places = {end: np.array(column, np.int64).reshape(-1, 3) for end, column in whole.items()}
    images = [end for end in ((image_column,) if image_column else (end[1:] for end in IMAGES)) if end in places]
    rows = np.logical_or.reduce([places[end][:, 0] >= 0 for end in images] or [np.zeros(0, bool)]).nonzero()[0]
    if not len(rows):
        wanted = f"member .{image_column} (data.image_column)" if image_column else "image"
        raise UserError(f"{path}: holds no {wanted}; names end in {', '.join(places) or 'nothing usual'}")

    def read(row: int, end: str, limit: int = MAX_PICTURE) -> tuple[str, bytes]:
        number, start, size = places[end][rows[row]].tolist()
        with files[number].open("rb") as file:
            file.seek(start)
            return f"{files[number]}: {keys[rows[row]]}.{end}", file.read(min(size, limit))

    def cells(indices: list[int]) -> list[Cell]:
        chosen = (next(end for end in images if places[end][rows[row], 0] >= 0) for row in indices)
        return [Cell(name, content) for name, content in map(read, indices, chosen)]

    def texts(end: str) -> list[Any]:
        found = [read(row, end, MAX_BYTES + 1) if places[end][rows[row], 0] >= 0 else None for row in range(len(rows))]
        cells = [each and (as_text(each[1], each[0]), each[0]) for each in found]
        return [each and (as_object(*each) if end == "json" else each[0]) for each in cells]

    columns = {end: partial(texts, end) for end in places if not is_image(f".{end}")}
    return Stored(path, cells, len(rows), columns)


def _samples(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Offset and size of the members of one tar by the names before their ends, and by these."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, place in _places(path).items():
        key, _, end = name.rpartition(".")
        if f".{end.lower()}" in SUFFIXES and not is_hidden(name):
            samples.setdefault(key, {})[end.lower()] = place
    for key in [key for key, sample in samples.items() if len(sample) == 1]:
        stem, _, more = key.rpartition(".")
        if more.isalpha() and len(samples.get(stem, ())) > 1:  # 0.seg.png beside 0.jpg and 0.txt
            ((end, place),) = samples.pop(key).items()
            samples[stem][f"{more}.{end}"] = place
    return samples


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of every member that is a file, or a link to one before it."""
    places: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            last = -1
            while (member := archive.next()) is not None and last < archive.offset:  # a size may be negative
                last = archive.offset
                archive.members = []  # type: ignore[attr-defined]  # or a tar of a million would fill the memory
                if member.issym() or member.islnk():
                    folder = posixpath.dirname(member.name) if member.issym() else ""
                    linked = posixpath.normpath(posixpath.join(folder, member.linkname))
                    places[member.name] = places.get(linked, (0, 0))
                elif member.isreg() and not member.issparse():
                    places[member.name] = (member.offset_data, member.size)
        with path.open("rb") as file:
            file.seek(last if last >= 0 else 0)
            if member or any(file.read(tarfile.BLOCKSIZE)):  # where tarfile ends without a word
                raise tarfile.ReadError(f"damaged at byte {last}")
    except Exception as error:  # tarfile raises almost any on damaged headers
        raise UserError(f"{path}: can't be read as a tar ({brief(error)}) (data.source)") from error
    return places
