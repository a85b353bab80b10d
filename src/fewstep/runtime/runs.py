"""What RUN, RUN@STEP and RUN@best-METRIC mean, parsed here alone, and which checkpoints of a run are the best."""

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from fewstep.errors import UserError
from fewstep.metric_table import cost
from fewstep.runtime.checkpoint import EVALUATIONS, RECIPE, check_run, checkpoint_folder, checkpoint_steps, ema_folder
from fewstep.runtime.manifest import faults
from fewstep.runtime.tracking import read_metrics


@dataclass(frozen=True)
class Found:
    """One model of a run: an average that a checkpoint holds, by default the first, which has no name."""

    run: Path
    step: int
    ema: str | None = None

    @property
    def checkpoint(self) -> Path:
        return checkpoint_folder(self.run, self.step)

    @property
    def folder(self) -> Path:
        """The model folder."""
        first = self.checkpoint / "model"
        return ema_folder(first, self.ema) if self.ema else first

    @property
    def averages(self) -> list["Found"]:
        """All that the checkpoint holds, the first in front."""
        prefix = ema_folder(Path("model"), "").name
        names = sorted(path.name.removeprefix(prefix) for path in self.checkpoint.glob(f"{prefix}*"))
        return [replace(self, ema=name) for name in (None, *names)]

    def check(self, *parts: str, digests: bool = True) -> None:
        """Raises UserError unless these parts of the checkpoint, by default the model, are what was written."""
        for _, what in faults(self.checkpoint, parts or (self.folder.name,), digests):
            others = ", ".join(f"{self.run}@{step}" for step in checkpoint_steps(self.run) if step != self.step)
            advice = f"take {others}" if others else "there is no other checkpoint"
            raise UserError(f"{self.checkpoint}: {what}; {advice}")


def best_steps(evaluations: Iterable[dict[str, float]]) -> dict[str, int]:
    """The step at which each metric was best, the first of equals; what is not a number is not compared."""
    best: dict[str, tuple[float, int]] = {}
    for line in evaluations:
        for name, value in line.items():
            less = cost(name, value)
            if name != "step" and math.isfinite(value) and (name not in best or less < best[name][0]):
                best[name] = (less, int(line["step"]))
    return {name: step for name, (_, step) in best.items()}


def _parse(text: str | Path) -> tuple[Path, str]:
    """The run folder, and what stands behind the sign."""
    whole = "@" not in str(text) or Path(text).exists()
    run, _, choice = (str(text), "", "") if whole else str(text).rpartition("@")
    return Path(run), choice


def run_folder(text: str | Path) -> Path:
    """The run folder that RUN, RUN@STEP or RUN@best-METRIC names, there or not."""
    return _parse(text)[0]


def is_run(text: str | Path) -> bool:
    """Whether it names a run folder that is there."""
    return (run_folder(text) / RECIPE).is_file()


def find(text: str | Path, ema: str | None = None) -> Found:
    """The model of RUN (its newest), RUN@STEP or RUN@best-METRIC, the best of those that are there.

    It is the average `ema`, or else the one that METRIC judged: RUN@best-ema0.99995_fid means the average 0.99995,
    without a name the first. Raises UserError, naming what there is, if the run has no such checkpoint or average, or
    if a file of the model is missing or has another size than was written; `Found.check` reads all bytes.
    """
    run, choice = _parse(text)
    check_run(run)
    steps = checkpoint_steps(run)
    if not steps:
        raise UserError(f"{run}: the run has no checkpoint yet; continue it with --resume")
    judged_steps = read_metrics(run / EVALUATIONS)
    best = best_steps(line for line in judged_steps if line["step"] in steps)
    choices = {str(step): step for step in steps} | {f"best-{name}": step for name, step in sorted(best.items())}
    if choice and choice not in choices:
        there = ", ".join(f"@{each}" for each in choices) + ("" if best else ", and was not evaluated as it ran")
        raise UserError(f"{run}: has no checkpoint @{choice}; it has {there}")
    metric = choice.removeprefix("best-")
    if metric in best and (lost := best_steps(judged_steps)[metric]) != best[metric]:
        _tell(
            f"{run}: by {metric} step {lost} was the best, but was not kept (evaluation.keep); {best[metric]} is taken"
        )
    judged = re.match("best-ema([^_]+)_", choice)
    found = Found(run, choices[choice] if choice else steps[-1], ema or (judged[1] if judged else None))
    if found not in found.averages:
        there = ", ".join(str(each.ema) for each in found.averages[1:]) or "none"
        what = f"has no average {found.ema!r} beside its first, which needs no name"
        raise UserError(f"{found.checkpoint}: {what}; it has {there}")
    found.check(digests=False)
    return found


@cache
def _tell(line: str) -> None:
    """On standard error, once, for a command finds the same run several times."""
    print(f"fewstep: {line}", file=sys.stderr)


def up_to(text: str | Path) -> tuple[Path, int | None]:
    """The run folder, and the step of RUN@STEP, which needs no checkpoint, or RUN@best-METRIC; None of the whole RUN.

    Raises UserError, naming what there is, where nothing is meant.
    """
    run, choice = _parse(text)
    check_run(run)
    if not choice or choice.isdecimal():
        return run, int(choice) if choice else None
    best = {f"best-{name}": step for name, step in sorted(best_steps(read_metrics(run / EVALUATIONS)).items())}
    if choice not in best:
        there = ", ".join(f"@{each}" for each in ("STEP", *best))
        raise UserError(f"{run}: has no step @{choice}; it has {there}")
    return run, best[choice]


def short_name(source: str | Path) -> str:
    """The last part of a run or of a path; of a model folder in a checkpoint RUN@STEP."""
    path = Path(source).resolve()
    return f"{path.parents[2].name}@{int(path.parent.name)}" if path.match("checkpoints/*/model") else path.name
