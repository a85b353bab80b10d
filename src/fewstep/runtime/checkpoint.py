"""A run is a folder; everything in it is written under a temporary name and then renamed.

recipe.yaml  facts.json  metrics.jsonl  evaluations.jsonl  samples/00000500.png  panels/00000500.png  frozen/
checkpoints/00000500/{model/, state/, manifest.json}

A student with several averages has the first in model/ and the others beside it, as model-ema0.99995/.
"""

from __future__ import annotations  # torch is imported only where a state is written or read

import os
import shutil
import sys
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.errors import Lost, UserError
from fewstep.files import check_room, read_json, size, written_folder
from fewstep.runtime.manifest import MANIFEST, digest, faults, names
from fewstep.runtime.shards import INDEX, STATE, read_state, shard_name
from fewstep.stopping import temporary

RECIPE = "recipe.yaml"
FACTS = "facts.json"  # what the run began with: digests of its data and of its teacher, and fewstep's version
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
FROZEN = "frozen"  # folder of a run: the autoencoder and the text encoders, which its checkpoints link to
OLD_STATE = "state.pt"  # of earlier versions, a pickle, of which torch takes tensors and plain values alone
STATES = (STATE, OLD_STATE)
KEEP = 2  # checkpoints; the older ones are removed, but for the best


def step_name(step: int) -> str:
    """Sorts as it counts."""
    return f"{step:08d}"


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / step_name(step)


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of a run's finished checkpoints, oldest first."""
    folder = run / "checkpoints"
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder}: is no folder; remove it, or choose another run")
    return sorted(int(path.name) for path in folder.glob("[0-9]" * 8))


def checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return [checkpoint_folder(run, step) for step in checkpoint_steps(run)]


def ema_folder(model: Path, ema: str) -> Path:
    """Where the average of that name lies beside the first, whose folder is `model`."""
    return model.with_name(f"{model.name}-ema{ema}")


@contextmanager
def new_checkpoint(run: Path, step: int, hidden: Path, needed: int, best: Collection[int]) -> Iterator[None]:
    """Inside, checkpoints/STEP is written as the folder `hidden`, then renamed: it is there whole or not at all.

    Those behind the newest two are then removed, but for the `best` steps. UserError, if it can't be written, says that
    one with a state of `needed` bytes was to be.
    """
    size_, advice = _needs(run, needed)
    try:
        with written_folder(checkpoint_folder(run, step), hidden):
            yield
    except Lost:
        raise
    except UserError as error:
        raise UserError(f"{error}; {advice} (a checkpoint takes {size(size_)})") from error
    for damaged in (*(run / "checkpoints").glob("*.damaged"), *run.glob(f"{FROZEN}.damaged")):
        shutil.rmtree(damaged, ignore_errors=True)  # for there is a newer one
    for old in checkpoint_steps(run)[:-KEEP]:
        if old not in best:
            outdated = checkpoint_folder(run, old)
            with temporary(outdated.with_name(f".{outdated.name}.old")) as hidden:
                outdated.rename(hidden)  # so that half of it never counts as a checkpoint


def make_room(run: Path, step: int, state_bytes: int) -> None:
    """Removes what a killed process left; UserError if a checkpoint of such a state has no room on the disk."""
    for left in (run / "checkpoints").glob(".*"):
        shutil.rmtree(left, ignore_errors=True)
    needed, advice = _needs(run, state_bytes)
    check_room(checkpoint_folder(run, step), needed, "a checkpoint", advice)


def _needs(run: Path, state_bytes: int) -> tuple[int, str]:
    """Bytes of a checkpoint, as far as they are known, and what helps where there is no room for them."""
    there = checkpoints(run)
    advice = f"make room and --resume, which {'goes on from the checkpoint before it' if there else 'begins anew'}"
    return max(_own_bytes(there[-1]) if there else 0, state_bytes), advice


def _own_bytes(checkpoint: Path) -> int:
    """Of its files but for those that it shares."""
    sizes = [path.stat() for path in checkpoint.rglob("*") if path.is_file()]
    return sum(each.st_size for each in sizes if each.st_nlink == 1)


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that is what was written, None of a run without any.

    Each damaged one behind it is named on standard error and set aside as STEP.damaged. What is not trained is shared
    by all of them: damaged, it is set aside itself, and written anew with the next. Raises UserError if none is whole.
    """
    found = checkpoints(run)
    for checkpoint in reversed(found):
        fault = next(_own_faults(run, checkpoint), None)
        if fault is None:
            if left := next(_shared_faults(run / FROZEN, checkpoint / "model"), None):
                _set_aside(run / FROZEN, left)
            return checkpoint
        _set_aside(checkpoint, fault)
    if found:
        raise UserError(f"{run}: no checkpoint of it is whole; choose another --out to begin anew")
    return None


def _own_faults(run: Path, checkpoint: Path) -> Iterator[str]:
    """What is wrong with a checkpoint alone; for what is wrong with shared files, these are set aside."""
    yield from _state_faults(checkpoint)
    for path, what in faults(checkpoint):
        if not path.is_file() or not _is_shared(run, checkpoint, path):
            yield what
        elif (run / FROZEN).is_dir():
            _set_aside(run / FROZEN, what)


def _is_shared(run: Path, checkpoint: Path, path: Path) -> bool:
    """Whether it is a link to what is not trained, and not one of a whole copy of the run by links."""
    folder, *name = path.relative_to(checkpoint).parts
    others = (each / folder for each in checkpoints(run) if each != checkpoint)
    return any(_same(path, each.joinpath(*name)) for each in (run / FROZEN, *others))


def _state_faults(checkpoint: Path) -> Iterator[str]:
    """What a manifest does not tell: files that it lacks, and a state that is of another step."""
    try:
        written = {name for name in names(checkpoint) if name.startswith(f"{STATE}/")}
    except UserError:
        return  # which `faults` tells
    if not written and not (checkpoint / STATE).is_dir():
        old = checkpoint / OLD_STATE
        if not old.is_file() or not zipfile.is_zipfile(old):  # an earlier version had no manifest
            yield f"{OLD_STATE} is torn or missing" if old.exists() else "holds no state"
        return
    there = {path.relative_to(checkpoint).as_posix() for path in (checkpoint / STATE).glob("*")}
    if not (checkpoint / MANIFEST).exists():
        yield f"{MANIFEST} is missing"
    if strange := sorted(there - written):
        yield f"{strange[0]} is not in {MANIFEST}"
    try:
        index = read_json(checkpoint / STATE / INDEX)
        wanted = {f"{STATE}/{shard_name(rank)}" for rank in range(min(index["shards"], len(there) + 1))}
    except (UserError, KeyError, TypeError):
        yield f"{STATE}/{INDEX} is damaged or missing"
        return
    if lost := sorted(wanted - written):
        yield f"{lost[0]} is missing"
    if (step := index.get("step")) != int(checkpoint.name):
        yield f"{STATE}/{INDEX} is of step {step}"


def _shared_faults(frozen: Path, model: Path) -> Iterator[str]:
    """What later checkpoints would lack, or have otherwise than the `model` of a whole one."""
    for path in model.rglob("*") if frozen.is_dir() else ():
        name = path.relative_to(model)
        shared, others = frozen / name, (each / "model" / name for each in model.parent.parent.iterdir())
        if path.is_dir():
            continue
        if shared.is_file():
            if not shared.samefile(path) and digest(shared) != digest(path):  # as copies are, without links
                yield f"{name} has other bytes than were written"
        # Not by the number of its links: a copy of the run may have been made by links, too.
        elif (shared.parent != frozen and shared.parent.is_dir()) or sum(_same(path, other) for other in others) > 1:
            yield f"{name} is missing"


def _same(path: Path, other: Path) -> bool:
    return other.is_file() and other.samefile(path)


def _set_aside(folder: Path, fault: str) -> None:
    aside = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    print(f"fewstep: {folder}: {fault}; it is set aside as {aside.name}", file=sys.stderr)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What was saved, as `read_state` gives it; raises UserError if files are missing or damaged."""
    path = state_path(checkpoint)
    try:
        return read_state(path) if path.name == STATE else _load_old(path)
    except Exception as error:  # a truncated file shows itself as almost any error
        advice = f"remove {checkpoint} to fall back on the one before it"
        raise UserError(f"{path}: the checkpoint can't be read; {advice}") from error


def state_path(checkpoint: Path) -> Path:
    """The folder, or the file of an earlier version."""
    old = checkpoint / OLD_STATE
    return old if old.exists() else checkpoint / STATE


def _load_old(path: Path) -> dict[str, Any]:
    import torch

    return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def check_run(run: Path) -> None:
    """Raises UserError unless `run` is a run folder."""
    if not (run / RECIPE).is_file():
        what = f"not a run folder (it has no {RECIPE})" if run.is_dir() else "no such run folder"
        raise UserError(f"{run}: {what}; name one that `fewstep teach` or `fewstep distill` wrote")
