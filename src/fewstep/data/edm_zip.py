"""Image sets as EDM's dataset_tool writes them: PNGs and a dataset.json, in a zip or in a folder."""

import json
import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.columns import Stored
from fewstep.data.decoding import MAX_BYTES, Cell
from fewstep.data.listing import is_hidden, is_image, list_files
from fewstep.errors import UserError, brief

LABELS = "dataset.json"
LOCAL_HEADER = 30  # bytes before an entry's name and extra field; the last four are the lengths of these


def is_edm_set(path: Path) -> bool:
    """Whether `open_edm_set` would try: a .zip, or a folder with a dataset.json."""
    return path.suffix.lower() == ".zip" if path.is_file() else (path / LABELS).is_file()


def open_edm_set(path: Path) -> Stored:
    """The set in a zip or a folder, in EDM's order, that of the names; of a zip, what is asked for is read when it is.

    dataset.json holds {"labels": [["00000/img00000000.png", 3], ...]}, or null for images without classes. Raises
    UserError if the files can't be read, or are not such a set.
    """
    return _open_zip(path) if path.is_file() else _open_folder(path)


def _open_folder(folder: Path) -> Stored:
    names = [name for name in list_files(folder) if is_image(name)]
    with (folder / LABELS).open("rb") as file:
        columns = _labels(file.read(_limit(len(names)) + 1), names, folder)
    return Stored(folder, lambda rows: [Cell(names[row], folder / names[row]) for row in rows], len(names), columns)


def _open_zip(path: Path) -> Stored:
    try:
        with zipfile.ZipFile(path) as archive:
            images = (each for each in archive.infolist() if is_image(each.filename) and not is_hidden(each.filename))
            entries = sorted(images, key=attrgetter("filename"))
            if LABELS not in archive.NameToInfo:
                raise UserError(f"{path}: has no {LABELS} at its top; EDM's dataset_tool writes it (data.source)")
            with archive.open(LABELS) as file:
                described = file.read(_limit(len(entries)) + 1)
    except UserError:
        raise
    except Exception as error:  # zipfile raises almost any on damaged files
        raise UserError(f"{path}: can't be read as a zip ({brief(error)}) (data.source)") from error
    for entry in entries:
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{path}: {entry.filename} is encrypted or compressed; zip the images as they are")
    labels = _labels(described, [entry.filename for entry in entries], path)
    places = np.array([(max(0, entry.header_offset), entry.compress_size) for entry in entries], np.int64)
    packed = np.array([entry.compress_type == zipfile.ZIP_DEFLATED for entry in entries])  # no object per image

    def cells(rows: list[int]) -> list[Cell]:
        found = zip(places[rows].tolist(), packed[rows].tolist(), strict=True)
        with path.open("rb") as file:
            return [_cell(file, start, size, deflated) for (start, size), deflated in found]

    return Stored(path, cells, len(entries), labels)


def _cell(file: Any, start: int, size: int, packed: bool) -> Cell:
    """One image of a zip whose local header begins at `start`; what is damaged can't be decoded as a picture."""
    file.seek(start + LOCAL_HEADER - 4)
    name_size, extra_size = (int.from_bytes(file.read(2), "little") for _ in range(2))
    name = file.read(name_size).decode(errors="replace")
    file.seek(extra_size, 1)
    content = file.read(min(size, MAX_BYTES))  # whatever the index says
    if packed:
        unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = unpacking.decompress(content, MAX_BYTES)
        except zlib.error as error:
            return Cell(name, None, f"damaged ({brief(error)})")
        if unpacking.unconsumed_tail:
            return Cell(name, None, f"unpacks to over {MAX_BYTES / 1e6:.0f} MB")
    return Cell(name, content)


def _limit(num: int) -> int:
    """Bytes of the description of so many images; a bomb has more."""
    return 2**20 + 2**10 * num


def _labels(described: bytes, names: Sequence[str], path: Path) -> dict[str, Any]:
    """The column of class indices of the images `names`; raises UserError unless each has one, or none has."""
    if len(described) > (limit := _limit(len(names))):
        raise UserError(f"{path}: its {LABELS} has over {limit / 1e6:.0f} MB for {len(names):,} images (data.source)")
    try:
        pairs = json.loads(described)["labels"]
        of_name = None if pairs is None else dict(pairs)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f'{path}: its {LABELS} must hold {{"labels": [[name, class], ...]}}, or null there') from error
    if not names:
        raise UserError(f"{path}: no images here beside its {LABELS}")
    if of_name is None:
        return {}
    known = set(names)
    absent = [name for name in of_name if name not in known]
    if absent:
        raise UserError(f"{path}: {absent[0]} is missing, one of {len(absent)} images that its {LABELS} names")
    return {"label": partial(list, [of_name.get(name) for name in names])}
