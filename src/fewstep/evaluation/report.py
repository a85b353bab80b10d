"""The table as text, JSON and one self-contained HTML page."""

import io
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fewstep.files import write_text
from fewstep.metric_table import METRICS, Interval, cost

MAX_CURVES = 4
IMAGE = '<img alt="{}" src="data:image/png;base64,{}">'
CURVES: dict[str, str] = yaml.safe_load(Path(__file__).with_name("curves.yaml").read_text("utf-8"))
"""The first four of these that the runs have are drawn."""
MAX_POINTS = 1000  # of a curve
INK = "#010203"  # becomes the page's own colour, light or dark


Curves = Mapping[str, Sequence[Mapping[str, float]]]
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
    """What every row has, and the metrics that any has."""
    return ["model", "sampler", "nfe", *(name for name in METRICS if any(name in row.values for row in rows))]


def text_table(rows: list[Row]) -> Table:
    """The table for a terminal: what goes into 78 columns of text."""
    heads = {name: METRICS[name].head if name in METRICS else name for name in columns(rows)}
    names = [name for name, head in heads.items() if head is not None]
    table = Table(*(heads[name] or name for name in names), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(table.columns):
        column.justify = "left" if index < 2 else "right"
    for row in rows:
        style = "bold" if row.sampler == "student" else None
        table.add_row(*(cell(name, row.cells.get(name)) for name in names), style=style)
    return table


def write_json(rows: list[Row], path: Path) -> None:
    """results.json: a list of rows, without what no row has; whole or not at all."""
    lines = [{name: row.cells.get(name) for name in columns(rows)} for row in rows]
    for beside in ("attributes", "intervals"):
        if any(getattr(row, beside) for row in rows):
            lines = [line | {beside: getattr(row, beside) or None} for line, row in zip(lines, rows, strict=True)]
    write_text(path, json.dumps(lines, indent=2) + "\n")


def write_page(
    rows: list[Row], curves: Curves, path: Path, title: str, kind: str, features: str, facts: Mapping[str, object]
) -> None:
    """report.html: the table, every row's grid, and curves from each run's metrics.

    `kind` is that of the models, label or text; `facts` say what was judged, and how.
    """
    template = Template(Path(__file__).with_name("report.html").read_text("utf-8"))
    page = template.substitute(
        title=escape(title),
        kind=kind,
        features=escape(features),
        facts="<br>\n".join(f"{escape(name)}: {escape(str(fact))}" for name, fact in facts.items()),
        table=_html_table(rows, columns(rows)),
        attributes=_attribute_tables(rows),
        grids="\n".join(
            _figure(row.title, IMAGE.format(escape(row.title), b64encode(row.grid).decode())) for row in rows
        ),
        curves=_curve_figures(curves),
    )
    write_text(path, page)


def _html_table(rows: list[Row], names: list[str]) -> str:
    """One line per row; students are marked."""
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
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


def _figure(caption: str, picture: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{picture}</figure>"


def _curve_figures(curves: Curves) -> str:
    """A figure per metric that the runs have, with one line per run; "" where there is none."""
    drawn = [name for name in CURVES if any(name in line for lines in curves.values() for line in lines)]
    figures = [_figure(CURVES[name], _curve_picture(curves, name)) for name in drawn[:MAX_CURVES]]
    about = '<p class="note">One line per run; x is the step.</p>'
    return "\n".join(["<h2>Training</h2>", about, '<div class="figures">', *figures, "</div>"] if figures else [])


def _curve_picture(curves: Curves, metric: str) -> str:
    """One metric of every run that has it, as SVG in the colour of the text around it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "text.color", "grid.color"), INK)
    options: dict[Any, Any] = {**colours, "svg.fonttype": "none", "svg.hashsalt": metric, "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        figure, axis = pyplot.subplots(figsize=(5.4, 3.2), layout="constrained")
        for name, lines in curves.items():
            points = [(line["step"], line[metric]) for line in lines if metric in line]
            points = points[:: -(-len(points) // MAX_POINTS)] if points else []
            axis.plot([x for x, _ in points], [y for _, y in points], label=name if points else None, linewidth=1.2)
        axis.grid(alpha=0.2)
        axis.legend(fontsize=8, framealpha=0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    svg = re.sub(r"<metadata>.*?</metadata>| xmlns(:\w+)?=\"[^\"]*\"", "", buffer.getvalue(), flags=re.DOTALL)
    return svg[svg.index("<svg") :].replace(INK, "currentColor").replace("xlink:href", "href")
