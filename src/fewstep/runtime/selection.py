"""Which checkpoints of a run are the best, and which one is meant by RUN, RUN@STEP or RUN@best-METRIC."""

from collections.abc import Iterable
from pathlib import Path

from fewstep.errors import UserError
from fewstep.runtime.checkpoint import EVALUATIONS, check_run, checkpoints
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


def find_checkpoint(text: str) -> Path:
    """The checkpoint of RUN (its newest), RUN@STEP or RUN@best-METRIC, the best of those that are there.

    Raises UserError, naming what there is, if the run has no such checkpoint.
    """
    whole = "@" not in text or Path(text).exists()
    name, _, choice = (text, "", "") if whole else text.rpartition("@")
    run = Path(name)
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
