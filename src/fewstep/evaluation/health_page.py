"""The page that answers whether a run converges: findings, curves with how to read them, pictures and settings."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from html import escape
from io import BytesIO
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

import fewstep
from fewstep.evaluation.curves import MAX_COLOURS, Point, number
from fewstep.evaluation.findings import Finding
from fewstep.evaluation.page import CURVES, curve_figure, figure, image, page, table
from fewstep.evaluation.windows import Lines
from fewstep.files import size
from fewstep.metric_table import METRICS, cost
from fewstep.runtime.runs import best_steps

MOST_RUNS = MAX_COLOURS
GRIDS = 6  # of a run, evenly spaced, with the first and the last
PICTURE_BYTES = 2_400_000  # of all pictures of a page, before base64 makes them a third longer
MOST_PIXELS = 64e6  # of a picture that is opened
GRID, PANEL = (510, 765), (1600, 2400)  # pixels, at most
GRIDS_TOLD = ("Samples as it went", "All of the same noise. Well: they get sharper, and stay unlike each other.")
PANELS_TOLD = (
    "The student's sample, and what teacher and critic make of it at several noise levels",
    "Well: the critic's pictures are like the student's, and what the teacher's have and they lack is what the student "
    "is pulled to. Ill: a critic that sees other pictures than the student's, or a teacher that sees none.",
)
LEVELS = {"ill": "ill", "watch": "to watch", "well": "well"}  # the worst first
SIGNS = {"ill": "✗ Ill", "watch": "! To watch", "well": "✓ Well"}  # for those who see no colours


@dataclass(frozen=True)
class Health:
    """One run, or what it was up to a step, as its page shows it."""

    name: str
    num_steps: int  # of the whole
    lines: Lines  # of metrics.jsonl
    evaluations: Lines
    findings: Sequence[Finding]
    grids: Sequence[Path]
    panels: Sequence[Path]
    settings: Mapping[str, str]  # by dotted key
    defaults: Mapping[str, str]
    about: Mapping[str, str]  # what settings mean
    checkpoints: Sequence[int]
    num_bytes: int
    written: float  # when, in seconds since 1970
    held: bool = False  # by a process that writes there
    until: int | None = None  # what comes behind this step is left out
    description: str = ""

    @property
    def step(self) -> int:
        """The newest that something is known of."""
        return int(max((line["step"] for line in (*self.lines[-1:], *self.evaluations[-1:])), default=0))

    @property
    def finished(self) -> bool:
        """Whether nothing more is to come."""
        return self.until is not None or (self.step >= self.num_steps and not self.held)

    @property
    def best(self) -> dict[str, int]:
        """The best step by each metric."""
        return best_steps(dict(line) for line in self.evaluations)

    def best_value(self, name: str) -> float:
        """By a metric that it was judged by."""
        return next(line[name] for line in self.evaluations if line["step"] == self.best[name] and name in line)


def health_page(runs: Sequence[Health], refresh: int | None = None) -> str:
    """The page as HTML; with `refresh` a browser loads it again after so many seconds."""
    budget = PICTURE_BYTES // max(1, sum(min(GRIDS, len(run.grids)) + 2 * bool(run.panels) for run in runs))
    title = ", ".join(run.name for run in runs)
    return page(
        "health.html",
        title if len(title) < 80 else f"{len(runs)} runs",
        "health",
        head=f'\n<meta http-equiv="refresh" content="{refresh}">' if refresh else "",
        description=escape(runs[0].description if len(runs) == 1 else "Each run has its colour."),
        runs=_states(runs),
        best=_bests(runs),
        findings=_findings(runs),
        curves="\n".join(_groups(runs)),
        grids="\n".join(_pictures(runs, GRIDS_TOLD, "grids", GRIDS, GRID, budget)),
        panels="\n".join(_pictures(runs, PANELS_TOLD, "panels", 1, PANEL, 2 * budget)),
        settings=_settings(runs),
        written=_when(time.time()),
        version=fewstep.__version__,
    )


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _name(runs: Sequence[Health], run: Health) -> str:
    """With the colour of its curves, where there are several."""
    swatch = f'<span class="swatch c{runs.index(run)}"></span>' if len(runs) > 1 else ""
    return f"{swatch}{escape(run.name)}"


def _states(runs: Sequence[Health]) -> str:
    """What each run is and how far it is, a column each: so it fits a telephone."""
    names = ("steps", "seconds per step", "last written", "size", "checkpoints")
    rows = zip(names, *map(_state, runs), strict=True)
    return table(("run", *(_name(runs, run) for run in runs)), rows)


def _state(run: Health) -> list[str]:
    seconds = [line["seconds_per_step"] for line in run.lines[-20:] if "seconds_per_step" in line]
    pace = median(seconds) if seconds else None
    left = timedelta(seconds=round((run.num_steps - run.step) * (pace or 0)))
    state = f"goes on{f', about {left} left' if left else ''}" if run.held else "stopped; --resume goes on"
    state = "finished" if run.finished else state
    after = state if run.until is None else f"shown up to {run.until:,}"
    ago = timedelta(seconds=max(0, round(time.time() - run.written)))
    return [
        _over(f"{run.step:,} of {run.num_steps:,}", after),
        number(pace) if pace else "–",
        _over(_when(run.written), f"{ago} before this page"),
        size(run.num_bytes),
        " ".join(f"@{step}" for step in run.checkpoints) or "none yet",
    ]


def _over(text: str, small: str) -> str:
    return f"{escape(text)}<small>{escape(small)}</small>" if small else escape(text)


def _bests(runs: Sequence[Health]) -> str:
    """The best value of each run by each metric and its step, a column each; of several the best of all is marked."""
    names = sorted({name for run in runs for name in run.best}, key=_order)
    if not names:
        return '<p class="note">Not judged on the way: <code>evaluation.every</code> is how often.</p>'
    return table(("best", *(_name(runs, run) for run in runs)), (_best_row(runs, name) for name in names))


def _best_row(runs: Sequence[Health], name: str) -> Iterator[str]:
    values = {run.name: run.best_value(name) for run in runs if name in run.best}
    first = min(values.values(), key=lambda value: cost(name, value))
    yield f"{escape(_plain(name))} {_better(name)}"
    for run in runs:
        if run.name in values:
            step, value = run.best[name], values[run.name]
            text = METRICS[name].text(value) if name in METRICS else number(value)
            mark = ' class="first"' if len(values) > 1 and value == first else ""
            kept = ", kept" if step in run.checkpoints else ""
            yield f"<span{mark}>{_over(text, f'@{step}{kept}')}</span>"
        else:
            yield "–"


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _order(name: str) -> tuple[int, str]:
    """Metrics as the table has them; those of further averages behind."""
    return (list(METRICS).index(name) if name in METRICS else len(METRICS), name)


def _better(name: str) -> str:
    """Which way."""
    return "→ 0" if cost(name, 1) == cost(name, -1) else "↓" if cost(name, 1) > 0 else "↑"


def _findings(runs: Sequence[Health]) -> str:
    """Of each run, the worst first; of many they are folded below their counts."""
    if len(runs) == 1:
        return f'<p class="note">{_counts(runs[0])}</p>{_list(runs[0])}'
    unfolded = " open" if len(runs) < 3 else ""
    parts = []
    for run in runs:
        first = f". {escape(_sorted(run)[0].what)}" if run.findings else ""
        summary = f"<summary>{_name(runs, run)}: {_counts(run)}{first}</summary>"
        parts.append(f"<details{unfolded}>{summary}{_list(run)}</details>")
    return "\n".join(parts)


def _counts(run: Health) -> str:
    told = (f"{sum(found.level == level for found in run.findings)} {LEVELS[level]}" for level in LEVELS)
    return ", ".join(told) if run.findings else f"no rule had enough of the run's {len(run.lines)} lines"


def _sorted(run: Health) -> list[Finding]:
    """The worst first, and in the order of the rules, in which causes are before what follows from them."""
    return sorted(run.findings, key=lambda found: list(LEVELS).index(found.level))


def _list(run: Health) -> str:
    lines = list[str]()
    for found in _sorted(run):
        parts = (found.what, f"{found.why} (step {found.step:,})", found.advice)
        what, why, advice = map(escape, parts)
        told = f"{what}<small>{why}</small>" + ("" if found.level == "well" else f"<small>{advice}</small>")
        lines.append(f'<li class="{found.level}"><b>{SIGNS[found.level]}.</b> {told}</li>')
    return f'<ul class="findings">{"".join(lines)}</ul>' if lines else ""


def _groups(runs: Sequence[Health]) -> Iterator[str]:
    """The groups of curves that any run has something for; what no group names comes last."""
    sources = [{run.name: run.lines for run in runs}, {run.name: run.evaluations for run in runs}]
    names = [dict.fromkeys(chain.from_iterable(chain(*source.values()))) for source in sources]
    drawn = [{"step"}, {"step"}]
    every = [line["step"] for run in runs for line in (*run.lines, *run.evaluations)]
    steps = (min(every, default=0), max(every, default=1))  # the same below all curves
    for group in CURVES["groups"]:
        judged = bool(group.get("judged"))
        named = _named(group, names[judged], drawn[judged])
        figures = [_curve(runs, sources[judged], each, judged, steps, **group["curves"][key]) for each, key in named]
        if any(figures):
            yield f'<h2>{escape(group["title"])}</h2><p class="note">{escape(group["read"])}</p>'
            yield '<div class="figures">' + "\n".join(figures) + "</div>"


def _named(group: Mapping[str, Any], there: Iterable[str], drawn: set[str]) -> list[tuple[str, str]]:
    """(name, key of the group) of what is there and not drawn yet, which it is from now on."""
    found = []
    for key, told in group["curves"].items():
        for name in sorted((name for name in there if fnmatch(name, key)), key=_order):
            if name not in drawn:
                drawn |= {name, told.get("beside", name)}
                found.append((name, key))
    return found


def _curve(
    runs: Sequence[Health], of: Mapping[str, Lines], name: str, judged: bool, steps: Point, text: str, **more: Any
) -> str:
    if judged:
        best = {run.name: run.best[name] for run in runs if name in run.best}
        return curve_figure(of, name, f"{_plain(name)} {_better(name)}", steps, best=best)
    return curve_figure(of, name, text or _plain(name), steps, **more)


def _pictures(
    runs: Sequence[Health], told: tuple[str, str], what: str, most: int, side: tuple[int, int], budget: int
) -> Iterator[str]:
    """Evenly spaced pictures of each run, with title and how to read them; what can't be shown is said."""
    for run in runs:
        chosen, broken = evenly(getattr(run, what), most), list[str]()
        figures = []
        for path in chosen:
            try:
                shown = image(shrunk(path, side, budget), f"{run.name}, step {int(path.stem):,}")
                figures.append(figure(f"step {int(path.stem):,}", shown))
            except Exception as error:  # decoders raise whatever they like on damaged files
                broken.append(f"{path.name} ({type(error).__name__})")
        if chosen:
            yield f"<h2>{escape(told[0])}{f': {escape(run.name)}' if len(runs) > 1 else ''}</h2>"
            yield f'<p class="note">{escape(told[1])}</p>'
            yield '<div class="figures">' + "\n".join(figures) + "</div>"
        if broken:
            yield f'<p class="told">Left out, for it can\'t be read: {escape(", ".join(broken))}</p>'


def evenly(paths: Sequence[Path], most: int) -> list[Path]:
    """At most so many, with the first and the last; of one alone the last."""
    last, num = len(paths) - 1, min(most, len(paths))
    return [paths[last - round(last * index / max(1, num - 1))] for index in reversed(range(num))]


def shrunk(path: Path, side: tuple[int, int], budget: int) -> bytes:
    """The picture in this box and so many bytes: a PNG, else a JPEG, made smaller until it fits.

    Raises ValueError for what is no file or has more pixels than are opened, and whatever Pillow raises.
    """
    if not path.is_file():  # a FIFO would be waited for
        raise ValueError(f"{path} is no file")
    with Image.open(path) as stored:
        if stored.width * stored.height > MOST_PIXELS:  # told by the header, before anything is unpacked
            raise ValueError(f"{stored.width} x {stored.height} pixels")
        picture = stored.convert("L" if stored.mode == "L" else "RGB")
    picture.thumbnail(side, Image.Resampling.BOX if picture.mode == "L" else Image.Resampling.LANCZOS)
    png = _encoded(picture, format="PNG", optimize=True)
    if len(png) <= budget:
        return png
    while len(jpeg := _encoded(picture, format="JPEG", quality=85)) > budget and min(picture.size) > 8:
        picture = picture.reduce(2)
    return jpeg


def _encoded(picture: Image.Image, **options: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, **options)
    return buffer.getvalue()


def _settings(runs: Sequence[Health]) -> str:
    """Of one run what differs from the defaults; of several, what differs between them."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    one = len(runs) == 1
    columns = [run.settings for run in runs] + ([runs[0].defaults] if one else [])
    differing = [key for key in keys if len({column.get(key, "–") for column in columns}) > 1]
    about = {key: text for run in runs for key, text in run.about.items()}
    names = {key: f'<code title="{escape(about.get(key, ""))}">{escape(key)}</code>' for key in differing}
    rows = [[name, *(escape(each.get(key, "–")) for each in columns)] for key, name in names.items()]
    title = "Settings that are not the defaults" if one else "Settings that differ"
    head = ["setting", *(_name(runs, run) if not one else "here" for run in runs), *(["default"] if one else [])]
    return f"<h2>{title}</h2>{table(head, rows) if rows else '<p class=note>None.</p>'}"
