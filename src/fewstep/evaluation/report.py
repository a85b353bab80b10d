"""The table as text, JSON and one self-contained HTML page."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fewstep.evaluation.page import CURVES, curve_figure, figure, image, page
from fewstep.evaluation.windows import Lines
from fewstep.files import write_text
from fewstep.metric_table import MAX_COMPARED, METRICS, Interval, cost, interval_kind

MAX_CURVES = 4
WIDTH, FEWEST = 78, 6  # of a terminal, and the columns that are there however long names are
BESIDE: list[str] = CURVES["beside_tables"]
"""The first four of these that the runs have are drawn."""
Curves = Mapping[str, Lines]
"""By run the lines of its metrics, each with its step."""


@dataclass(frozen=True)
class Row:
    """One line of the table; a metric that has no meaning in it is not among its values."""

    model: str
    sampler: str | None
    nfe: int | None  # as the sampler None for the real images; of other images alone
    values: dict[str, float]
    intervals: dict[str, Interval] = field(default_factory=dict)  # of 95 %, where one is known
    attributes: dict[str, dict[str, float]] = field(default_factory=dict)
    """What prompts say, and the share of the images in which it is so: a table of its own per kind of prompt."""
    grid: bytes = b""  # a picture of its first images

    @property
    def title(self) -> str:
        """Above its grid."""
        return self.model if self.nfe is None else f"{self.model}, {self.sampler} (nfe {self.nfe})"

    @property
    def cells(self) -> dict[str, Any]:
        """By column."""
        return {"model": self.model, "sampler": self.sampler, "nfe": self.nfe, **self.values}


def cell(name: str, value: object) -> str:
    """A value as tables show it."""
    if value is None or not isinstance(value, float):
        return "–" if value is None else str(value)
    return METRICS[name].text(value) if name in METRICS else f"{value:.3f}"


def columns(rows: list[Row]) -> list[str]:
    """What every row has, and the metrics that any has, scorers' last."""
    there = dict.fromkeys(name for row in rows for name in row.values)
    return ["model", "sampler", "nfe", *(name for name in dict.fromkeys((*METRICS, *there)) if name in there)]


def text_table(rows: list[Row]) -> Table:
    """The table for a terminal: what goes into 78 columns of text, but never a FID alone."""
    heads = {name: METRICS[name].head if name in METRICS else name for name in columns(rows)}
    texts = {
        name: [head or name, *(cell(name, row.cells.get(name)) for row in rows)]
        for name, head in heads.items()
        if head is not None
    }
    while len(texts) > FEWEST and sum(max(map(len, column)) + 2 for column in texts.values()) > WIDTH:
        texts.popitem()  # what the page alone shows
    head, *lines = zip(*texts.values(), strict=True)
    table = Table(*head, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(table.columns):
        column.justify = "left" if index < 2 else "right"
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*line, style="bold" if row.sampler == "student" else None)
    return table


def write_json(rows: list[Row], path: Path) -> None:
    """results.json: a list of rows, without what no row has; whole or not at all."""
    lines = [{name: row.cells.get(name) for name in columns(rows)} for row in rows]
    for beside in ("attributes", "intervals"):
        if any(getattr(row, beside) for row in rows):
            lines = [line | {beside: getattr(row, beside) or None} for line, row in zip(lines, rows, strict=True)]
    if kinds := interval_kinds(rows):
        lines = [line | {"interval_kinds": kinds} for line in lines]
    write_text(path, json.dumps(lines, indent=2) + "\n")


def interval_kinds(rows: list[Row]) -> dict[str, str]:
    """By column, of those that have one: jackknife, wilson or bootstrap."""
    known = [name for name in columns(rows) if any(name in row.intervals for row in rows)]
    return {name: kind for name in known if (kind := interval_kind(name))}


def write_page(
    rows: list[Row], curves: Curves, path: Path, title: str, kind: str, features: str, facts: Mapping[str, object]
) -> None:
    """report.html: the table, every row's grid, and curves from each run's metrics.

    `kind` is that of the models, label or text; `facts` say what was judged, and how.
    """
    grids = (figure(row.title, image(row.grid, row.title)) for row in rows if row.grid)
    whole = page(
        "report.html",
        title,
        kind,
        features=escape(features),
        facts="<br>\n".join(f"{escape(name)}: {escape(str(fact))}" for name, fact in facts.items()),
        table=_html_table(rows, columns(rows)),
        columns=_about(rows),
        compared=f"{MAX_COMPARED:,}",
        attributes=_attribute_tables(rows),
        grids="\n".join(grids),
        curves=_curve_figures(curves),
    )
    write_text(path, whole)


def _html_table(rows: list[Row], names: list[str]) -> str:
    """One line per row; students are marked."""
    ways = {name: f' class="{METRICS[name].better}"' for name in names if name in METRICS}
    head = "".join(f"<th{ways.get(name, '')}>{name.replace('_', ' ')}</th>" for name in names)
    best = {name: _best(rows, name) for name in names}
    lines = [f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>']
    for row in rows:
        cells = "".join(_cell(row, name, best[name]) for name in names)
        lines.append(f'<tr class="{"student" if row.sampler == "student" else ""}">{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def _cell(row: Row, name: str, best: float | None) -> str:
    """A value, marked where it is the best of the models, with its 95 % interval below where one is known."""
    value, interval = row.cells.get(name), row.intervals.get(name)
    mark = ' class="best"' if row.sampler is not None and value is not None and value == best else ""
    below = f"<small>{' … '.join(cell(name, end) for end in interval)}</small>" if interval else ""
    return f"<td{mark}>{escape(cell(name, value))}{below}</td>"


def _about(rows: list[Row]) -> str:
    """What each column means, and how its interval was found."""
    kinds, names = interval_kinds(rows), [name for name in columns(rows) if name in METRICS]
    told = {name: METRICS[name].about + (f"; interval: {kinds[name]}" if name in kinds else "") for name in names}
    return "<br>\n".join(f"<b>{name.replace('_', ' ')}</b>: {escape(text)}" for name, text in told.items())


def _attribute_tables(rows: list[Row]) -> str:
    """Prompt accuracy attribute by attribute, one table per kind of prompt; "" where no row has any."""
    told = [row for row in rows if row.attributes]
    tables = []
    for kind, shares in told[0].attributes.items() if told else ():
        table = [Row(row.model, row.sampler, row.nfe, row.attributes[kind]) for row in told]
        tables.append(f"<h2>{kind.replace('_', ' ')}, attribute by attribute</h2>")
        tables.append(_html_table(table, ["model", "sampler", *shares]))
    return "\n".join(tables)


def _best(rows: list[Row], name: str) -> float | None:
    """The best value of a column among several models; the row of the real images does not compete."""
    values = [row.values[name] for row in rows if row.sampler is not None and name in row.values]
    return min(values, key=lambda value: cost(name, value)) if len(values) > 1 else None


def _curve_figures(curves: Curves) -> str:
    """A figure per number that the runs have, with one line per run; "" where there is none."""
    captions = {name: told["text"] for group in CURVES["groups"] for name, told in group["curves"].items()}
    drawn = [name for name in BESIDE if any(name in line for lines in curves.values() for line in lines)]
    figures = [curve_figure(curves, name, captions[name]) for name in drawn[:MAX_CURVES]]
    about = '<p class="note">One line per run; x is the step.</p>'
    return "\n".join(["<h2>Training</h2>", about, '<div class="figures">', *figures, "</div>"] if figures else [])
