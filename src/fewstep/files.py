"""Files and folders: written whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fewstep.errors import UserError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path that takes the name `path` if the block ends well; several processes may write the same path."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be written ({' '.join(str(error).split())})") from error
    finally:
        with suppress(OSError):  # of a folder that could not be made
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


@contextmanager
def written_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name if the block ends well; else nothing is left of it."""
    out = out.resolve()
    temporary, old = (out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.{suffix}") for suffix in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _take_place(temporary, out, old)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: can't be written ({' '.join(str(error).split())})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(new: Path, out: Path, old: Path) -> None:
    """Renames; what was there is removed when the new folder stands, and put back if it can't."""
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
