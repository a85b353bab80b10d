"""The table as text, JSON and one self-contained HTML page."""

import base64
import io
import json
from dataclasses import asdict, fields
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from fewstep.evaluation.metrics import Row
from fewstep.pictures import grid, png_bytes

LOWER_IS_BETTER = {"fid"}
HIGHER_IS_BETTER = {
    "precision",
    "recall",
    "accuracy",
    "prompt_accuracy",
    "two_objects",
    "diversity",
    "images_per_second",
}
BESIDE = ("attributes", "intervals")  # what is not a single value
CURVES = {
    "denoising_loss": "denoising loss (of the critic, where there is one)",
    "dm_image_grad_norm": "gradient norm at the image: distribution matching",
    "gan_image_grad_norm": "gradient norm at the image: GAN",
    "logit_gap": "discriminator: mean logit of reals minus fakes",
}


def cell(name: str, value: object) -> str:
    """A value as the table shows it."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if name == "images_per_second":
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:.3f}"


def columns(rows: list[Row]) -> list[str]:
    """The columns in which any row has a single value."""
    values = [asdict(row) for row in rows]
    names = [field.name for field in fields(Row) if field.name not in BESIDE]
    return [name for name in names if any(row[name] is not None for row in values)]


def text_table(rows: list[Row]) -> Table:
    """The table for a terminal."""
    names = columns(rows)
    heads = [
        {"images_per_second": "images/s", "prompt_accuracy": "prompt", "two_objects": "two"}.get(n, n) for n in names
    ]
    table = Table(*heads, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # 78 columns of text
    for index, column in enumerate(table.columns):
        column.justify = "left" if index < 2 else "right"
    for row in rows:
        style = "bold" if row.sampler == "student" else None
        table.add_row(*(cell(name, getattr(row, name)) for name in names), style=style)
    return table


def write_json(rows: list[Row], path: Path) -> None:
    """results.json: a list of rows, without what no row has; whole or not at all."""
    kept = [*columns(rows), *(name for name in BESIDE if any(getattr(row, name) for row in rows))]
    lines = [{name: getattr(row, name) for name in kept} for row in rows]
    _write(path, json.dumps(lines, indent=2) + "\n")


def write_page(
    rows: list[Row],
    grids: dict[str, bytes],
    curves: dict[str, list[dict]],
    path: Path,
    title: str,
    summary: str,
    notes: str,
) -> None:
    """report.html: the table, a picture (PNG bytes) per name of `grids`, and curves from each run's metrics."""
    template = Template((files("fewstep.evaluation") / "report.html").read_text())
    page = template.substitute(
        title=escape(title),
        summary=escape(summary),
        notes=escape(notes),
        table=_html_table(rows),
        attributes=_attribute_tables(rows),
        grids="\n".join(_figure(name, picture) for name, picture in grids.items()),
        curves=_curve_section(curves),
    )
    _write(path, page)


def sample_grid(images: Tensor, columns: int = 10) -> bytes:
    """uint8 images (N, C, H, W) as one PNG."""
    return png_bytes(grid(images, columns))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _html_table(rows: list[Row]) -> str:
    names = columns(rows)
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    best = {name: _best(rows, name) for name in names}
    lines = [f"<table><thead><tr>{head}</tr></thead><tbody>"]
    for row in rows:
        cells = ""
        for name in names:
            value = getattr(row, name)
            mark = ' class="best"' if row.nfe is not None and value is not None and value == best[name] else ""
            cells += f"<td{mark}>{escape(cell(name, value))}{_interval(row, name)}</td>"
        lines.append(f'<tr class="{"student" if row.sampler == "student" else ""}">{cells}</tr>')
    return "\n".join([*lines, "</tbody></table>"])


def _interval(row: Row, name: str) -> str:
    """The 95 % interval under a value, where one is known."""
    if name not in (row.intervals or {}):
        return ""
    low, high = row.intervals[name]  # type: ignore[index]
    return f"<small>{cell(name, low)} … {cell(name, high)}</small>"


def _attribute_tables(rows: list[Row]) -> str:
    """Prompt accuracy attribute by attribute, one table per kind of prompt; "" where no row has any."""
    told = [(row, row.attributes) for row in rows if row.attributes]
    return "\n".join(_attribute_table(kind, told) for kind in told[0][1]) if told else ""


def _attribute_table(kind: str, told: list[tuple[Row, dict[str, dict[str, float]]]]) -> str:
    names = list(told[0][1][kind])
    head = "".join(f"<th>{name}</th>" for name in ("model", "sampler", *names))
    lines = [f"<h2>{kind.replace('_', ' ')}, attribute by attribute</h2>", f"<table><thead><tr>{head}</tr></thead>"]
    for row, shares in told:
        values = [row.model, row.sampler, *(shares[kind][name] for name in names)]
        lines.append("<tr>" + "".join(f"<td>{escape(cell('', value))}</td>" for value in values) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _best(rows: list[Row], name: str) -> float | None:
    """The best value of a column among the models; the row of the real images does not compete."""
    values = [getattr(row, name) for row in rows if row.nfe is not None and getattr(row, name) is not None]
    if not values or name not in LOWER_IS_BETTER | HIGHER_IS_BETTER:
        return None
    return min(values) if name in LOWER_IS_BETTER else max(values)


def _figure(caption: str, picture: bytes) -> str:
    data = base64.b64encode(picture).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure><figcaption>{escape(caption)}</figcaption>{image}</figure>"


def _curve_section(curves: dict[str, list[dict]]) -> str:
    if not curves:
        return ""
    return (
        f"<h2>Training</h2>\n{_figure('one panel per metric, one line per run; x is the step', _curve_picture(curves))}"
    )


def _curve_picture(curves: dict[str, list[dict]]) -> bytes:
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
