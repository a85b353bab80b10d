"""Metrics of a run, and its progress bar."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from fewstep.errors import UserError
from fewstep.files import write_text, writing

Report = Callable[[int, dict[str, float]], None]
"""Called with the number of finished steps and, when there are new ones, the metrics."""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl or evaluations.jsonl; [] if there is none. A last line torn by a kill is left out.

    null, for a number that was not finite, is read as NaN.
    """
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        read = [json.loads(line) for line in lines if line.endswith("}")]
        return [{name: math.nan if value is None else value for name, value in line.items()} for line in read]
    except ValueError as error:  # neither UTF-8 nor JSON
        raise UserError(f"{path}: can't be read; remove it, which loses the run's curves and nothing else") from error


def to_line(values: dict[str, float]) -> str:
    """One line of JSON, which knows no NaN and no infinity: they are null."""
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def write_line(path: Path, step: int, values: dict[str, float]) -> None:
    """Appends {"step": step, **values}."""
    with writing(path), path.open("a") as file:
        file.write(to_line({"step": step, **values}))


def rewind(path: Path, step: int) -> None:
    """Drops the lines behind `step`, before a resumed run writes them again."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_text(path, "".join(to_line(line) for line in kept))


def is_count(name: str) -> bool:
    """Whether a metric is a count, of skipped updates or of samples that were not finite: summed, and told if not 0."""
    return name.startswith(("skipped_", "not_finite_"))


class Metrics:
    """Means since the last line of metrics.jsonl, summed on the device: numbers reach the host only in `write`.

    Values that are not finite are left out, for the updates that they belong to are skipped.
    """

    def __init__(self, path: Path):
        self.path = path
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Takes in the 0-d tensors of one step."""
        for name, value in metrics.items():
            finite = value.isfinite()
            self.sums[name] = self.sums.get(name, 0) + value.where(finite, 0)
            self.counts[name] = self.counts.get(name, 0) + finite

    def write(self, step: int) -> dict[str, float]:
        """Appends one line with the means, and those counts that are not zero."""
        means = [sums.float() / (1 if is_count(name) else self.counts[name]) for name, sums in self.sums.items()]
        values = dict(zip(self.sums, torch.stack(means).tolist(), strict=True)) if means else {}
        self.sums, self.counts = {}, {}
        line = {name: value for name, value in values.items() if math.isfinite(value) and (value or not is_count(name))}
        write_line(self.path, step, line)
        return line

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.counts = {name: torch.as_tensor(count, device=device) for name, count in state["counts"].items()}


def progress_columns() -> Progress:
    """The progress display of every long job, on standard error; plain pipes get nothing."""
    return Progress(
        *(TextColumn("{task.description:<16}"), BarColumn(bar_width=12), MofNCompleteColumn()),
        *(TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}")),
        console=Console(stderr=True, quiet=not sys.stderr.isatty()),  # else rich < 15 ends a disabled bar by a newline
        disable=not sys.stderr.isatty(),
    )


def first_metric(metrics: dict[str, float]) -> str:
    """What fits behind a progress bar."""
    return next((f"{name} {value:.3g}" for name, value in metrics.items()), "")


def advance(progress: Progress, task: TaskID, done: int, note: str) -> None:
    """An empty note leaves the one that stands there."""
    fields: dict[str, Any] = {"note": note} if note else {}
    progress.update(task, completed=done, **fields)


@contextmanager
def progress_bar(title: str, total: int, report: Report | None = None) -> Iterator[Report]:
    """One progress bar with the time left and the first metric; or, instead of it, what `report` does."""
    if report is not None:
        yield report
        return
    with progress_columns() as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda step, metrics: advance(progress, task, step, first_metric(metrics))
