"""Files and folders: written whole or not at all."""

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fewstep.errors import UserError, brief
from fewstep.stopping import cleaned, remove, temporary, undisturbed

FULL = "No space left|quota exceeded"


def read_text(path: Path) -> str:
    """The text of a file; raises UserError where it is none, can't be read, or is not UTF-8."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would be waited for
            raise UserError(f"{path}: can't be read, for it is no file")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or 'it is no UTF-8'})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises UserError where it holds none."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({brief(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is damaged (it holds no JSON object)")
    return content


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What keeps a file or a folder from being written is a UserError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = f"; {size(free_bytes(path))} of disk are free" if re.search(FULL, str(error)) else ""
        raise UserError(f"{path}: can't be written ({' '.join(str(error).split())}){full}") from error


def free_bytes(path: Path) -> int:
    """What the disk has room for where a path is, or is to be."""
    return shutil.disk_usage(nearest(path)).free


def nearest(path: Path) -> Path:
    """The path itself if it is there, else the folder above it that is."""
    return next(each for each in (path, *path.absolute().parents) if os.path.exists(each))


def size(num_bytes: int) -> str:
    """For people: in GB, MB or bytes."""
    if num_bytes < 1e5:
        return f"{num_bytes} bytes"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def check_room(path: Path, num_bytes: int, what: str, otherwise: str) -> None:
    """Raises UserError, which says what is missing and what helps, if there is no room for so much."""
    free = free_bytes(path)
    if num_bytes > free:
        told = f"{size(num_bytes)} of {what}, but only {size(free)} of disk are free, {size(num_bytes - free)} too few"
        raise UserError(f"{path}: {told}; {otherwise}")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path that takes the name `path` if the block ends well; several processes may write the same path."""
    with temporary(_hidden(path, "tmp")) as hidden, writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield hidden
        os.replace(hidden, path)


def _hidden(path: Path, suffix: str) -> Path:
    """A name beside it that nobody else takes."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{suffix}")


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    with written_whole(path) as hidden:
        hidden.write_text(text, encoding="utf-8")


@contextmanager
def folder_lock(folder: Path, name: str = ".lock", wait: bool = False) -> Iterator[None]:
    """Holds the lock file `name` in a folder, which is made if need be; the kernel frees it when the process ends.

    A folder that was made for it, and is still empty, is removed with it. Raises UserError, naming folder and process,
    if another holds it; with `wait` it waits instead.
    """
    path, made = folder / name, [each for each in (folder, *folder.parents) if not each.exists()]

    def clean() -> None:
        path.unlink(missing_ok=True)  # while it is held
        with suppress(OSError):
            for each in made:
                each.rmdir()

    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(path, wait)
    try:
        with cleaned(clean):
            yield
    finally:
        os.close(file)


def _locked(path: Path, wait: bool) -> int:
    """The descriptor of the file, locked while it still has its name: who had it before may have removed it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = os.pread(file, 20, 0).decode() or "another"
            os.close(file)
            raise UserError(f"{path.parent}: process {holder} writes there; wait for its end, or stop it") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system that knows no locks
                raise
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file).st_ino:
                os.ftruncate(file, 0)
                os.pwrite(file, str(os.getpid()).encode(), 0)
                return file
        os.close(file)


@contextmanager
def written_folder(out: Path, hidden: Path | None = None) -> Iterator[Path]:
    """A temporary folder beside `out`, `hidden` or another, that takes its name if all ends well; else none is left."""
    out = out.resolve()
    with temporary(hidden or _hidden(out, "tmp")) as hidden, writing(out):
        hidden.mkdir(parents=True, exist_ok=True)
        yield hidden
        _take_place(hidden, out)


def _take_place(new: Path, out: Path) -> None:
    """Renames; what was there is removed when the new folder stands, and put back if it can't."""
    old = _hidden(out, "old")
    with undisturbed():
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        remove(old)
