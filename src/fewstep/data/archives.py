"""Archives of images, of whose members an index is kept and what is asked for is read: WebDataset tars, EDM's zips."""

import json
import posixpath
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.columns import Stored
from fewstep.data.decoding import MAX_BYTES, Cell
from fewstep.data.listing import IMAGES, TEXTS, is_hidden, is_image, list_files
from fewstep.data.texts import MAX_BYTES as MAX_TEXT
from fewstep.data.texts import as_object, as_text
from fewstep.errors import UserError, brief

SUFFIXES = {*IMAGES, *TEXTS, ".json", ".cls"}
LABELS = "dataset.json"
LOCAL_HEADER = 30  # bytes before the name and extra field of a zip's entry; the last four are the lengths of these


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

    def read(row: int, end: str, limit: int = MAX_BYTES) -> tuple[str, bytes]:
        number, start, size = places[end][rows[row]].tolist()
        with files[number].open("rb") as file:
            file.seek(start)
            return f"{files[number]}: {keys[rows[row]]}.{end}", file.read(min(size, limit))

    def cells(indices: list[int]) -> list[Cell]:
        chosen = (next(end for end in images if places[end][rows[row], 0] >= 0) for row in indices)
        return [Cell(name, content) for name, content in map(read, indices, chosen)]

    def texts(end: str) -> list[Any]:
        found = [read(row, end, MAX_TEXT + 1) if places[end][rows[row], 0] >= 0 else None for row in range(len(rows))]
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


def is_edm_set(path: Path) -> bool:
    """Whether `open_edm_set` would try: a .zip, or a folder with a dataset.json."""
    return path.suffix.lower() == ".zip" if path.is_file() else (path / LABELS).is_file()


def open_edm_set(path: Path) -> Stored:
    """The set in a zip or a folder, in EDM's order, that of the names; of a zip, what is asked for is read when it is.

    dataset.json holds {"labels": [["00000/img00000000.png", 3], ...]}, or null for images without classes. Raises
    UserError if the files can't be read, or are not such a set.
    """
    if path.is_file():
        return _open_zip(path)
    names = [name for name in list_files(path) if is_image(name)]
    with (path / LABELS).open("rb") as file:
        columns = _labels(file.read(_limit(len(names)) + 1), names, path)
    return Stored(path, lambda rows: [Cell(names[row], path / names[row]) for row in rows], len(names), columns)


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
