"""What the files of a folder were when it was written: manifest.json holds size and SHA-256 of each."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from fewstep.errors import UserError
from fewstep.files import read_json

MANIFEST = "manifest.json"
Entry = dict[str, str | int]


def names(folder: Path) -> set[str]:
    """The files that were written; none of a folder of an earlier version. Raises UserError if that is damaged."""
    return set(_read(folder))


def write_manifest(
    folder: Path, siblings: Iterable[Path] = (), told: Mapping[str, Entry] = MappingProxyType({})
) -> None:
    """Of all files in `folder`: those that are `told`, and others that are looked for.

    One that it shares with a sibling, by a hard link, is not read again.
    """
    known = dict[tuple[int, int], str | int]()
    for sibling in siblings:
        with suppress(UserError):  # a damaged one gives nothing
            there = {sibling / name: entry["sha256"] for name, entry in _read(sibling).items()}
            known |= {_identity(path): sha256 for path, sha256 in there.items() if path.is_file()}
    entries = dict(told)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and name not in told:
            entries[name] = entry(path, known.get(_identity(path)))
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")


def entry(path: Path, sha256: str | int | None = None) -> Entry:
    """What a manifest tells of a file, which is read unless its digest is known."""
    return {"size": path.stat().st_size, "sha256": sha256 or digest(path)}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def faults(folder: Path, parts: Iterable[str] = (), digests: bool = True) -> Iterator[tuple[Path, str]]:
    """The files in `folder`, or in those `parts` of it, that are not what was written, and what is wrong with each.

    Without `digests` only sizes are compared. A folder of an earlier version has no manifest, and so no fault.
    """
    try:
        entries = _read(folder)
    except UserError:
        yield folder / MANIFEST, f"{MANIFEST} can't be read"
        return
    wanted = {name: entry for name, entry in entries.items() if not parts or name.split("/")[0] in parts}
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        found = pool.map(lambda name: _fault(folder, name, wanted[name], digests), wanted)
        yield from ((folder / name, fault) for name, fault in zip(wanted, found, strict=True) if fault)


def _fault(folder: Path, name: str, entry: Entry, digests: bool) -> str:
    """What is wrong with a file, if anything is."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return f"{name} leads out of the folder"
    if (size := path.stat().st_size) != entry["size"]:
        return f"{name} has {size} bytes instead of {entry['size']}"
    return f"{name} has other bytes than were written" if digests and digest(path) != entry["sha256"] else ""


def _read(folder: Path) -> dict[str, Entry]:
    """File -> size and sha256; raises UserError if that is damaged."""
    path = folder / MANIFEST
    entries = read_json(path) if os.path.lexists(path) else {}
    for name, entry in entries.items():
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"size", "sha256"}
            or Path(name).is_absolute()
            or ".." in Path(name).parts
        ):
            raise UserError(f"{path}: is damaged ({name!r} is no file of the folder)")
    return entries


def _identity(path: Path) -> tuple[int, int]:
    """The same for all hard links of a file."""
    return path.stat().st_dev, path.stat().st_ino
