"""The table as text, JSON and one self-contained HTML page."""

import base64
import io
import json
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fewstep.evaluation.metrics import Interval
from fewstep.files import write_text
from fewstep.metric_table import METRICS, lower_is_better

CURVES_TITLE = "one panel per metric, one line per run; x is the step"
CURVES = {
    "denoising_loss": "denoising loss (of the critic, where there is one)",
    "dm_image_grad_norm": "gradient norm at the image: distribution matching",
    "gan_image_grad_norm": "gradient norm at the image: GAN",
    "logit_gap": "discriminator: mean logit of reals minus fakes",
}


@dataclass(frozen=True)
class Row:
    """One line of the table; a metric that has no meaning in it is not among its values."""

    model: str
    sampler: str | None
    nfe: int | None  # as the sampler None for the real images
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
    rows: list[Row], curves: dict[str, list[dict[str, float]]], path: Path, title: str, summary: str, notes: str
) -> None:
    """report.html: the table, every row's grid, and curves from each run's metrics."""
    template = Template((files("fewstep.evaluation") / "report.html").read_text())
    page = template.substitute(
        title=escape(title),
        summary=escape(summary),
        notes=escape(notes),
        table=_html_table(rows, columns(rows)),
        attributes=_attribute_tables(rows),
        grids="\n".join(_figure(row.title, row.grid) for row in rows),
        curves=f"<h2>Training</h2>\n{_figure(CURVES_TITLE, _curve_picture(curves))}" if curves else "",
    )
    write_text(path, page)


def _html_table(rows: list[Row], names: list[str]) -> str:
    """One line per row; students are marked."""
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    best = {name: _best(rows, name) for name in names}
    lines = [f"<table><thead><tr>{head}</tr></thead><tbody>"]
    for row in rows:
        cells = "".join(_cell(row, name, best[name]) for name in names)
        lines.append(f'<tr class="{"student" if row.sampler == "student" else ""}">{cells}</tr>')
    return "\n".join([*lines, "</tbody></table>"])


def _cell(row: Row, name: str, best: float | None) -> str:
    """A value, marked where it is the best of the models, with its 95 % interval below where one is known."""
    value, interval = row.cells.get(name), row.intervals.get(name)
    mark = ' class="best"' if row.nfe is not None and value is not None and value == best else ""
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
    """The best value of a column among the models; the row of the real images does not compete."""
    values = [row.values[name] for row in rows if row.nfe is not None and name in row.values and name in METRICS]
    return (min if lower_is_better(name) else max)(values, default=None)


def _figure(caption: str, picture: bytes) -> str:
    data = base64.b64encode(picture).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure><figcaption>{escape(caption)}</figcaption>{image}</figure>"


def _curve_picture(curves: dict[str, list[dict[str, float]]]) -> bytes:
    """One panel per metric, one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6), layout="constrained")
    for axis, (metric, title) in zip(axes.flat, CURVES.items(), strict=True):
        for name, lines in curves.items():
            points = [(line["step"], line[metric]) for line in lines if metric in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    pyplot.close(figure)
    return buffer.getvalue()
