"""Image sets as EDM's dataset_tool writes them: PNGs and a dataset.json, in a zip or in a folder."""

import json
import mmap
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.stored import Stored
from fewstep.errors import UserError, brief

LABELS = "dataset.json"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
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
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if _is_image(file.name))
    labels = _labels((folder / LABELS).read_bytes(), names, folder)
    stored = np.array([name.encode() for name in names])  # no object per image

    def cells(rows: list[int]) -> list[dict[str, Any]]:
        return [{"bytes": None, "path": str(folder / stored[row].decode())} for row in rows]

    return Stored(cells, len(names), labels)


def _open_zip(path: Path) -> Stored:
    try:
        with zipfile.ZipFile(path) as archive:
            images = (entry for entry in archive.infolist() if _is_image(entry.filename))
            entries = sorted(images, key=attrgetter("filename"))
            if LABELS not in archive.NameToInfo:
                raise UserError(f"{path}: has no {LABELS} at its top; EDM's dataset_tool writes it (data.source)")
            described = archive.read(LABELS)
    except (zipfile.BadZipFile, OSError, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path}: can't be read as a zip ({brief(error)}) (data.source)") from error
    for entry in entries:
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{path}: {entry.filename} is encrypted or compressed; zip the images as they are")
    labels = _labels(described, [entry.filename for entry in entries], path)
    places = np.array([(entry.header_offset, entry.compress_size) for entry in entries], np.int64)
    packed = np.array([entry.compress_type == zipfile.ZIP_DEFLATED for entry in entries])
    with path.open("rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def cells(rows: list[int]) -> list[dict[str, Any]]:
        found = zip(places[rows].tolist(), packed[rows].tolist(), strict=True)
        return [_cell(whole, start, size, deflated) for (start, size), deflated in found]

    return Stored(cells, len(entries), labels)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _cell(whole: mmap.mmap, start: int, size: int, packed: bool) -> dict[str, Any]:
    """One image of a zip whose local header begins at `start`; what is damaged can't be decoded as a picture."""
    name = start + LOCAL_HEADER
    name_size, extra_size = (int.from_bytes(whole[at : at + 2], "little") for at in (name - 4, name - 2))
    begin = name + name_size + extra_size
    content = whole[begin : begin + size]
    with suppress(zlib.error):
        content = zlib.decompress(content, -zlib.MAX_WBITS) if packed else content
    return {"bytes": content, "path": whole[name : name + name_size].decode(errors="replace")}


def _labels(described: bytes, names: Sequence[str], path: Path) -> Tensor | None:
    """Class indices of the images `names`; raises UserError unless each has one, or none has."""
    try:
        pairs = json.loads(described)["labels"]
        of_name = None if pairs is None else dict(pairs)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f'{path}: its {LABELS} must hold {{"labels": [[name, class], ...]}}, or null there') from error
    if not names:
        raise UserError(f"{path}: no images here beside its {LABELS}")
    if of_name is None:
        return None
    known = set(names)
    absent = [name for name in of_name if name not in known]
    if absent:
        raise UserError(f"{path}: {absent[0]} is missing, one of {len(absent)} images that its {LABELS} names")
    bare = next((name for name in names if name not in of_name), None)
    if bare is not None:
        told = f"{len(of_name)} of {len(names)} images"
        raise UserError(f"{path}: its {LABELS} has labels for {told}, and none for {bare}")
    wrong = next((name for name in names if type(of_name[name]) is not int or of_name[name] < 0), None)
    if wrong is not None:
        what = str(of_name[wrong])[:40]
        raise UserError(f"{path}: labels must be class indices 0, 1, 2, ..., but {wrong} has {what}")
    return torch.tensor([of_name[name] for name in names], dtype=torch.int64)
