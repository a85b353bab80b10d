"""Which files belong to a source: one rule for what kind it is, what is read of it, and its digest."""

import os
from pathlib import Path

from fewstep.data.shards import digest
from fewstep.errors import UserError, brief

IMAGES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jfif", ".jpe", ".apng", ".tga"),
    *(".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)
TEXTS = (".txt", ".caption")  # of the image beside it
TABLES = (".parquet", ".tar")
DESCRIPTIONS = ("metadata.csv", "metadata.jsonl", "dataset.json", "latents.json")
MAX_LINKS = 3  # to folders, one below the other; loops end without it, a net of links would take for ever


def is_image(name: str) -> bool:
    """By the end of its name."""
    return name.lower().endswith(IMAGES)


def list_files(folder: Path) -> list[str]:
    """The names of the files below a folder, with slashes, in their order; paths are literal.

    Links are followed, loops of them end; what is hidden, of a Mac's archiver, or no file (pipes, devices) is no part
    of it. Raises UserError if a folder can't be read.
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
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir():
                    waiting.append((f"{prefix}{entry.name}/", (*above, here), links + entry.is_symlink()))
                elif entry.is_file() or (
                    entry.is_symlink() and not os.path.exists(entry)
                ):  # it is told where it is read
                    names.append(prefix + entry.name)
    except OSError as error:
        raise UserError(f"{folder}: can't be read ({brief(error)}) (data.source)") from error
    return sorted(names)


def files_digest(path: Path) -> str:
    """16 hex digits of the names, relative to the source, and the sizes of its files, as far as they hold its data."""
    names = [""]
    if path.is_dir():
        ends = (*IMAGES, *TEXTS, *TABLES, *DESCRIPTIONS, ".safetensors")
        names = [name for name in list_files(path) if name.lower().endswith(ends)]
    sizes = [os.path.getsize(path / name) if (path / name).exists() else -1 for name in names]
    return digest([*zip(names, sizes, strict=True)])
