"""Which checkpoints of a run are the best, and which checkpoint and model RUN, RUN@STEP or RUN@best-METRIC mean."""

import re
from collections.abc import Iterable
from pathlib import Path

from fewstep.errors import UserError
from fewstep.runtime.checkpoint import EVALUATIONS, check_run, checkpoints, ema_folder
from fewstep.runtime.tracking import read_metrics


def best_steps(evaluations: Iterable[dict[str, float]]) -> dict[str, int]:
    """The step at which each metric was best, the first of equals; less is better for `fid` and `..._fid` alone."""
    best: dict[str, dict[str, float]] = {}
    for line in evaluations:
        for name in line.keys() - {"step"}:
            sign = 1 if name.endswith("fid") else -1
            if name not in best or sign * line[name] < sign * best[name][name]:
                best[name] = line
    return {name: int(line["step"]) for name, line in best.items()}


def run_and_choice(text: str) -> tuple[Path, str]:
    """The run folder of RUN, RUN@STEP or RUN@best-METRIC, and what stands behind the sign."""
    whole = "@" not in text or Path(text).exists()
    run, _, choice = (text, "", "") if whole else text.rpartition("@")
    return Path(run), choice


def find_checkpoint(text: str) -> Path:
    """The checkpoint of RUN (its newest), RUN@STEP or RUN@best-METRIC, the best of those that are there.

    Raises UserError, naming what there is, if the run has no such checkpoint.
    """
    run, choice = run_and_choice(text)
    check_run(run)
    found = {int(path.name): path for path in checkpoints(run)}
    if not found:
        raise UserError(f"{run}: the run has no checkpoint yet; continue it with --resume")
    best = best_steps(line for line in read_metrics(run / EVALUATIONS) if line["step"] in found)
    choices = {str(step): step for step in found} | {f"best-{name}": step for name, step in sorted(best.items())}
    if choice and choice not in choices:
        there = ", ".join(f"@{each}" for each in choices) + ("" if best else ", and was not evaluated as it ran")
        raise UserError(f"{run}: has no checkpoint @{choice}; it has {there}")
    return found[choices[choice] if choice else max(found)]


def find_model(text: str, ema: str | None = None) -> Path:
    """The model folder of RUN, RUN@STEP or RUN@best-METRIC: of the average `ema`, or else the one that METRIC judged.

    RUN@best-ema0.99995_fid means the average 0.99995, without a name the first. Raises UserError, naming those that
    there are, if the checkpoint has no such average.
    """
    checkpoint = find_checkpoint(text)
    judged = re.match("best-ema([^_]+)_", run_and_choice(text)[1])
    ema = ema or (judged[1] if judged else None)
    found = other_emas(checkpoint)
    if ema is not None and ema not in found:
        there = ", ".join(found) or "none"
        raise UserError(f"{checkpoint}: has no average {ema!r} beside its first, which needs no name; it has {there}")
    return found[ema] if ema else checkpoint / "model"


def other_emas(checkpoint: Path) -> dict[str, Path]:
    """The model folders of the averages beside the first, by name."""
    pattern = ema_folder(checkpoint / "model", "*").name
    return {path.name.removeprefix(pattern[:-1]): path for path in sorted(checkpoint.glob(pattern))}
