"""Which files belong to a source: one rule for what kind it is, what is read of it, and its digest."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fewstep.data.shards import digest
from fewstep.errors import UserError, brief

IMAGES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jfif", ".jpe", ".apng", ".tga"),
    *(".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)
TEXTS = (".txt", ".caption")  # of the image beside it
METADATA = ("metadata.csv", "metadata.jsonl")
DATA = (*IMAGES, *TEXTS, *METADATA, ".parquet", ".tar", "dataset.json", "latents.json", ".safetensors")
MAX_LINKS = 3  # to folders, one below the other; loops end without it, a net of links would take for ever
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def is_image(name: str) -> bool:
    """By the end of its name, whatever stands before."""
    return name.lower().endswith(IMAGES)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no part of the data: hidden, or of a Mac's archiver."""
    return any((part[:1] == "." and part.strip(".")) or part == "__MACOSX" for part in name.split("/"))


def list_files(folder: Path) -> list[str]:
    """The names of the files below a folder, with slashes, in their order; paths are literal.

    Links are followed, loops of them end; pipes and devices are no files. Raises UserError if a folder can't be read.
    """
    names: list[str] = []
    waiting: list[tuple[str, tuple[tuple[int, int], ...], int]] = [("", (), 0)]
    try:
        while waiting:
            prefix, above, links = waiting.pop()
            if links > MAX_LINKS:
                raise UserError(f"{folder / prefix}: more than {MAX_LINKS} links to folders, one below the other")
            status = os.stat(folder / prefix)
            here = (status.st_dev, status.st_ino)
            for entry in os.scandir(folder / prefix) if here not in above else ():
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    waiting.append((f"{prefix}{entry.name}/", (*above, here), links + entry.is_symlink()))
                elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry)):  # told when it is read
                    names.append(prefix + entry.name)
    except OSError as error:
        raise UserError(f"{folder}: can't be read ({brief(error)}) (data.source)") from error
    return sorted(names)


def files_digest(path: Path) -> str:
    """16 hex digits of the names, relative to the source, and the sizes of its files, as far as they hold its data."""
    names = [name for name in list_files(path) if name.lower().endswith(DATA)] if path.is_dir() else [""]
    sizes = [os.path.getsize(path / name) if (path / name).exists() else -1 for name in names]
    return digest([*zip(names, sizes, strict=True)])


def of_split(names: Sequence[str], split: str, path: Path) -> list[str]:
    """The files of a split, of shards as their names or folders begin with its own (train-00000.parquet), else train;
    of images only where all lie in folders that are named so. Raises UserError if there is no such split.
    """
    if is_image(names[0]):
        folders = [SPLITS.get(name.split("/")[0].lower()) if "/" in name else None for name in names]
        found = {name: each if all(folders) else "train" for name, each in zip(names, folders, strict=True)}
    else:
        words = {name: re.findall(r"(?:^|/)([a-z]+)", name.lower()) for name in names}
        found = {name: next(filter(None, map(SPLITS.get, each)), "train") for name, each in words.items()}
    wanted, has = SPLITS.get(split.lower(), split), ", ".join(sorted({repr(each) for each in found.values()}))
    if wanted not in found.values():
        raise UserError(f"{path}: data.split: no split {split!r} here, but {has}")
    return [name for name in names if found[name] == wanted]
