"""Rows of several runs each, one per seed: means and deviations as a table, all numbers as JSON, and a plot of FIDs."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from textwrap import wrap
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fewstep.metric_table import METRICS

SHOWN = ("fid", "patch_fid", "precision", "recall", "clip", "accuracy", "prompt_accuracy", "two_objects", "diversity")
OF_STOPS = ("fid", "fid_mean", "accuracy", "prompt_accuracy", "two_objects")
ROOM = 46  # of a terminal's 78 columns, for metrics
DECADE = 10  # times the smallest: beyond it the axis of a plot is logarithmic
Values = Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """What became of one seed of a row."""

    seed: int | None
    folder: str
    version: str | None = None
    seconds: float | None = None  # of its training
    values: Values = field(default_factory=dict)  # by metric; none of a run that is missing
    stops: Sequence[Values] = ()  # of a student of several steps, the last of which are its values
    missing: str = ""  # why


@dataclass(frozen=True)
class Line:
    """A row of the table: several seeds, or a single judgement of a model that was made once."""

    name: str
    runs: Sequence[Run]
    recipe: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # what its recipe says beyond the defaults
    differences: Sequence[str] = ()  # of it from that of the first line

    @property
    def there(self) -> list[Run]:
        """The runs that have numbers."""
        return [run for run in self.runs if run.values]

    @property
    def seeded(self) -> bool:
        return self.recipe is not None

    def numbers(self, name: str) -> list[float]:
        """Of the runs that have this one."""
        return [run.values[name] for run in self.there if name in run.values]

    def cell(self, name: str, deviation: bool = True) -> str:
        return told(self.numbers(name), METRICS[name].text if name in METRICS else "{:.3f}".format, deviation)

    @property
    def count(self) -> str:
        """How many runs its numbers are of."""
        if not self.seeded:
            return ""
        return f"{len(self.there)}" + (f" of {len(self.runs)}" if len(self.there) < len(self.runs) else "")

    @property
    def seconds(self) -> str:
        """Of a run."""
        return told([run.seconds for run in self.there if run.seconds], "{:,.0f}".format, False)


def told(numbers: Sequence[float], text: Callable[[float], str], deviation: bool = True) -> str:
    """The mean, and of several the deviation of a sample, over n - 1."""
    if not numbers:
        return "–"
    return text(mean(numbers)) + (f" ± {text(stdev(numbers)).lstrip('+')}" if deviation and len(numbers) > 1 else "")


def columns(lines: Sequence[Line]) -> list[str]:
    """The metrics of the table: those that any line has, and scorers, which stand in no list."""
    there = dict.fromkeys(name for line in lines for run in line.there for name in run.values)
    return [
        name for name in dict.fromkeys((*SHOWN, *there)) if name in there and (name in SHOWN or name not in METRICS)
    ]


def markdown(lines: Sequence[Line], title: str, facts: Sequence[str]) -> str:
    """The table of means and deviations, that of stops, and what is missing."""
    names = columns(lines)
    head = ["row", *(name.replace("_", " ") for name in names), "seeds", "seconds a run"]
    body = [[line.name, *map(line.cell, names), line.count, line.seconds] for line in lines]
    parts = [f"# {title}", *facts, _grid(head, body)]
    if stops := list(stop_cells(lines)):
        most = max(len(cells) for _, cells in stops)
        rows = [[name, *cells, *[""] * (most - len(cells))] for name, cells in stops]
        parts += ["By stop: FID, of which in the mean; the share of the images that are right.", ""]
        parts[-1] = _grid(["row", *(f"stop {number + 1}" for number in range(most))], rows)
    if absent := list(missing(lines)):
        parts += ["Missing:", "\n".join(f"- {each}" for each in absent)]
    return "\n\n".join(parts) + "\n"


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    align = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(each.replace('|', '/') for each in row)} |" for row in (head, align, *body))


def stop_cells(lines: Sequence[Line]) -> Iterator[tuple[str, list[str]]]:
    """Of every line with several stops its name and a text per stop, of means over its runs."""
    for line in lines:
        stopped = [run.stops for run in line.there if run.stops]
        if stopped:
            yield line.name, [_stop_cell(stops) for stops in zip(*stopped, strict=True)]


def _stop_cell(stops: Sequence[Values]) -> str:
    means = {name: mean(stop[name] for stop in stops) for name in OF_STOPS if all(name in stop for stop in stops)}
    fid = METRICS["fid"].text(means["fid"]) + (f" ({means['fid_mean']:.2g})" if "fid_mean" in means else "")
    return ", ".join([fid, *(METRICS[name].text(means[name]) for name in OF_STOPS[2:] if name in means)])


def missing(lines: Sequence[Line]) -> Iterator[str]:
    """A line for every run that has no numbers."""
    for line in lines:
        for run in line.runs:
            if not run.values:
                seed = "" if run.seed is None else f", seed {run.seed}"
                yield f"{line.name}{seed} ({run.folder}): {run.missing}"


def text_table(lines: Sequence[Line]) -> Table:
    """The table for a terminal: FID with its deviation, of the others the means, as many as there is room for."""
    names = columns(lines)
    texts = {
        name: [METRICS[name].head or name if name in METRICS else name]
        + [line.cell(name, deviation=name == "fid") for line in lines]
        for name in names
    }
    while len(texts) > 1 and sum(max(map(len, column)) + 2 for column in texts.values()) > ROOM:
        texts.popitem()  # what the files alone tell
    texts |= {"seeds": ["seeds", *(line.count for line in lines)], "s": ["s/run", *(line.seconds for line in lines)]}
    head, *body = zip(*texts.values(), strict=True)
    table = Table("row", *head, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for line, cells in zip(lines, body, strict=True):
        table.add_row(line.name, *cells, style=None if line.seeded else "dim")
    return table


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Of every line its runs, their mean and, of several, their deviation."""
    found = []
    for line in lines:
        names = dict.fromkeys(name for run in line.there for name in run.values)
        numbers = {name: line.numbers(name) for name in names}
        means = {name: mean(each) for name, each in numbers.items()}
        deviations = {name: stdev(each) for name, each in numbers.items() if len(each) > 1}
        facts: dict[str, Any] = {"name": line.name, "recipe": line.recipe}
        facts |= {"settings": dict(line.settings), "differences": list(line.differences)}
        found.append({**facts, "mean": means, "sd": deviations, "runs": [asdict(run) for run in line.runs]})
    return found


def plot(lines: Sequence[Line], title: str) -> bytes:
    """A PNG: FID of every run as a dot, of every row mean and deviation; what was made once is a line across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = [line for line in lines if line.seeded and line.there]
    levels = {line.name: line.numbers("fid")[0] for line in lines if not line.seeded and line.there}
    figure = Figure(figsize=(7.5, 1.1 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for at, line in enumerate(rows):
        fids = line.numbers("fid")
        spread = stdev(fids) if len(fids) > 1 else 0.0
        axes.plot(fids, [at] * len(fids), "o", color=f"C{at % 10}", alpha=0.35, markersize=5, markeredgewidth=0)
        axes.errorbar(
            mean(fids), at, xerr=spread, fmt="|", color=f"C{at % 10}", markersize=13, capsize=4, linewidth=1.6
        )
    for number, (name, level) in enumerate(levels.items()):
        axes.axvline(level, color="0.45", linewidth=1, linestyle=("--", ":", "-.")[number % 3], label=name)
    fids = [fid for line in rows for fid in line.numbers("fid")]
    every = [*fids, *levels.values()]
    if min(every) > 0 and max(every) > DECADE * min(every):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
    axes.set_yticks(range(len(rows)), [line.name for line in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.set_xlabel("FID, less is better: a dot is a run, the bar mean ± sd", fontsize=9)
    figure.suptitle("\n".join(wrap(title, 90)), fontsize=10)  # over the whole width: names of rows can be long
    if levels:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": "fewstep"})
    return file.getvalue()
