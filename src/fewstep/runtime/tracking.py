"""Metrics of a run, and its progress bar."""

from __future__ import annotations  # torch is imported only where numbers are on a device: a page reads lines alone

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fewstep.errors import UserError
from fewstep.files import read_text, write_text, writing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Item = TypeVar("Item")
Report = Callable[[int, dict[str, float]], None]
"""Called with the number of finished steps and, when there are new ones, the metrics."""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl or evaluations.jsonl; [] if there is none. A last line torn by a kill is left out.

    null, for a number that was not finite, is read as NaN.
    """
    try:
        lines = read_text(path).splitlines() if os.path.lexists(path) else []
        return [
            {name: math.nan if value is None else float(value) for name, value in line.items()}
            | {"step": int(line["step"])}
            for line in map(json.loads, (line for line in lines if line.endswith("}")))
        ]
    except (UserError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
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


class StepClock:
    """Seconds per step since it was last asked, without what was `aside`, and the most memory that was ever taken."""

    def __init__(self, device: torch.device):
        self.device, self.steps, self.began, self.off, self.waited = device, 0, time.perf_counter(), 0.0, 0.0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is not part of steps."""
        before = time.perf_counter()
        yield
        self.off += time.perf_counter() - before

    def each(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The batches of all steps, which training may have to wait for."""
        before = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - before
            yield batch
            before = time.perf_counter()

    def read(self) -> dict[str, float]:
        """`seconds_per_step`, `data_wait`, the part of it in waiting, and `peak_memory_gb`, of GPU or process."""
        now, steps = time.perf_counter(), max(1, self.steps)
        seconds, waited = (now - self.began - self.off) / steps, self.waited / steps
        self.steps, self.began, self.off, self.waited = 0, now, 0.0, 0.0
        machine = {"seconds_per_step": round(seconds, 6), "data_wait": round(waited, 6)}
        return machine | {"peak_memory_gb": round(peak_memory(self.device) / 1e9, 3)}


def peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU's memory at most, or of the process on a CPU, which has its libraries in it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Allowance:
    """Keeps a job that comes again and again within a share of the time that has passed since this was made.

    It counts on the next one taking as long as the last; of the first nothing is known, and it is allowed.
    """

    def __init__(self, share: float):
        self.share, self.began = share, time.perf_counter()
        self.spent, self.last, self.refused = 0.0, 0.0, 0

    def allows(self) -> bool:
        """Whether behind the next one no more than the share would have gone to them; a share of 1 allows all."""
        behind = time.perf_counter() - self.began + self.last
        return self.spent + self.last <= self.share * behind

    @contextmanager
    def spending(self) -> Iterator[None]:
        """One of them."""
        before = time.perf_counter()
        yield
        self.last = time.perf_counter() - before
        self.spent += self.last


def is_count(name: str) -> bool:
    """Whether a metric is a count, of skipped updates or of samples that were not finite: summed, and told if not 0."""
    return name.startswith(("skipped_", "not_finite_"))


class Metrics:
    """Means since the last line of metrics.jsonl, summed on the device: numbers reach the host only in `write`.

    Values that are not finite are left out, for the updates that they belong to are skipped. Without a path nothing is
    written: a rank that is not the first has the same numbers.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Takes in the 0-d tensors of one step."""
        for name, value in metrics.items():
            finite = value.isfinite()
            self.sums[name] = self.sums.get(name, 0) + value.where(finite, 0)
            self.counts[name] = self.counts.get(name, 0) + finite

    def write(self, step: int, more: dict[str, float] | None = None) -> dict[str, float]:
        """Appends one line with the means, those counts that are not zero, and what the host knows besides."""
        import torch

        means = [sums.float() / (1 if is_count(name) else self.counts[name]) for name, sums in self.sums.items()]
        values = dict(zip(self.sums, torch.stack(means).tolist(), strict=True)) if means else {}
        self.sums, self.counts = {}, {}
        line = {name: value for name, value in values.items() if math.isfinite(value) and (value or not is_count(name))}
        line |= more or {}
        if self.path:
            write_line(self.path, step, line)
        return line

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        import torch

        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.counts = {name: torch.as_tensor(count, device=device) for name, count in state["counts"].items()}


def first_metric(metrics: dict[str, float]) -> str:
    """What fits behind a progress bar: the first that says how well it goes."""
    told = [name for name in metrics if not name.endswith("_norm") and not is_count(name)]
    return next((f"{name} {metrics[name]:.3g}" for name in told or metrics), "")


Advance = Callable[[int, str], None]
"""Told what is done, and a note; an empty one leaves the note that stands there."""


@contextmanager
def progress_display(seconds: float = 10.0) -> Iterator[Callable[[str, int], Advance]]:
    """The progress of long jobs on standard error: starts one by its title and its total.

    A terminal has bars. Where there is none, a job has a line whenever it has a note and the last one is `seconds` old.
    """
    if not sys.stderr.isatty():
        yield lambda title, total: _Lines(title, total, seconds).advance
        return
    columns = TextColumn("{task.description:<16}"), BarColumn(bar_width=12), MofNCompleteColumn()
    left = TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, *left, console=Console(stderr=True)) as bars:

        def start(title: str, total: int) -> Advance:
            task = bars.add_task(title, total=total, note="")

            def advance(done: int, note: str) -> None:
                fields: dict[str, Any] = {"note": note} if note else {}
                bars.update(task, completed=done, **fields)

            return advance

        yield start


class _Lines:
    """A job's progress where there is no terminal."""

    def __init__(self, title: str, total: int, seconds: float):
        self.title, self.total, self.seconds = title, total, seconds
        self.told = self.began = time.monotonic()
        self.first: int | None = None  # of a resumed job more than the beginning was done before

    def advance(self, done: int, note: str) -> None:
        now = time.monotonic()
        if self.first is None and done:
            self.began, self.first = now, done
        if self.first is None or now - self.told < self.seconds or not (note or self.seconds):
            return
        self.told = now
        left = (now - self.began) / max(1, done - self.first) * (self.total - done)
        told = [f"{done:,}/{self.total:,}", *([f"{timedelta(seconds=round(left))} left"] if done > self.first else [])]
        print(f"{self.title}: {', '.join([*told, *([note] if note else [])])}", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(title: str, total: int, report: Report | None = None, seconds: float = 10.0) -> Iterator[Report]:
    """The progress of one job, with the first metric as its note; or, instead of it, what `report` does."""
    if report is not None:
        yield report
        return
    with progress_display(seconds) as start:
        advance = start(title, total)
        yield lambda step, metrics: advance(step, first_metric(metrics))
