"""Where verbs write, and what they say when they have; quick to import."""

import os
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from fewstep.errors import UserError
from fewstep.evaluation.findings import find
from fewstep.files import nearest
from fewstep.runtime.checkpoint import EVALUATIONS, METRICS
from fewstep.runtime.tracking import read_metrics


def check_writable(folder: Path) -> None:
    """Raises UserError if nothing could be written in `folder`, there or not yet; writes nothing."""
    with suppress(FileNotFoundError, NotADirectoryError):  # which tells a name that is too long
        os.lstat(folder)
    there = nearest(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out: {there} is not a folder that can be written to; choose another")


def free_place(named: Path | None, default: Path, taken: Callable[[Path], bool], overwrite: bool) -> Path:
    """What --out named, else the default or, where that is taken, the first free of its names with a number behind.

    Raises UserError if what was named is taken, unless it is to be overwritten.
    """
    if named is not None and taken(named) and not overwrite:
        raise UserError(f"--out {named}: exists already; replace it with --overwrite, or choose another name")
    numbered = (default.with_stem(f"{default.stem}-{number}") for number in count(2))
    free = default if overwrite or not taken(default) else next(path for path in numbered if not taken(path))
    return named or free


def tell_done(wrote: str, *next_commands: str) -> None:
    """Prints what a verb wrote, and the command lines that come next, without the program's name."""
    print(f"wrote {wrote}")
    for command in next_commands:
        print(f"next: fewstep {command}")


def tell_health(run: Path, recipe: Any) -> None:
    """Prints what is ill in the curves of a run that is done, at most two lines."""
    lines, evaluations = (read_metrics(run / name) for name in (METRICS, EVALUATIONS))
    found = find(lines, evaluations, recipe.model_dump(mode="json"))
    for each in [each for each in found if each.level == "ill"][:2]:
        print(f"health: {each.what} {each.why}; {each.advice}")
