"""A run is a folder; everything in it is written under a temporary name and then renamed.

recipe.yaml  metrics.jsonl  evaluations.jsonl  samples/00000500.png  checkpoints/00000500/{model/, state.pt}

A student with several averages has the first in model/ and the others beside it, as model-ema0.99995/.
"""

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import UserError

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
FROZEN = "frozen"  # folder of a run: the autoencoder and the text encoders, which its checkpoints link to
KEEP = 2  # checkpoints; the older ones are removed, but for the best


def step_name(step: int) -> str:
    """Sorts as it counts."""
    return f"{step:08d}"


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / step_name(step)


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of a run's finished checkpoints, oldest first."""
    return sorted(int(path.name) for path in (run / "checkpoints").glob("[0-9]" * 8) if path.is_dir())


def checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return [checkpoint_folder(run, step) for step in checkpoint_steps(run)]


def ema_folder(model: Path, ema: str) -> Path:
    """Where the average of that name lies beside the first, whose folder is `model`."""
    return model.with_name(f"{model.name}-ema{ema}")


def save_checkpoint(
    run: Path, step: int, state: dict[str, Any], save_model: Callable[[Path], None], best: Collection[int] = ()
) -> None:
    """Writes checkpoints/STEP whole or not at all, then removes those behind the newest two, but for the `best` steps.

    `save_model` writes what `sample` and `evaluate` load; `state` is what resuming needs besides.
    """
    final = checkpoint_folder(run, step)
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "model").mkdir(parents=True)
    save_model(temporary / "model")
    torch.save({"step": step, **state}, temporary / "state.pt")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in checkpoint_steps(run)[:-KEEP]:
        if old not in best:
            shutil.rmtree(checkpoint_folder(run, old))


def load_state(checkpoint: Path, lazy: bool = False) -> dict[str, Any]:
    """What `save_checkpoint` was given; raises UserError if the file is missing or damaged.

    `lazy` leaves the tensors on the disk until they are used, for those who need but a few of them.
    """
    path = checkpoint / "state.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)
    except Exception as error:  # a truncated file shows itself as almost any error
        raise UserError(
            f"{path}: the checkpoint can't be read; remove {checkpoint} to fall back on the one before it"
        ) from error


def check_run(run: Path) -> None:
    """Raises UserError unless `run` is a run folder."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder; name one that `fewstep teach` or `fewstep distill` wrote")
    if not (run / RECIPE).is_file():
        raise UserError(
            f"{run}: not a run folder (it has no {RECIPE}); name one that `fewstep teach` or `distill` wrote"
        )
