"""What pages share: the frame with its style, figures, pictures, and curves of runs below their names."""

from base64 import b64encode
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml

from fewstep.evaluation.curves import MAX_COLOURS, Curve, Point, number, picture
from fewstep.evaluation.windows import Lines

CURVES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("curves.yaml").read_text("utf-8"))
"""Which numbers of runs are drawn: groups with how to read them, and what stands beside a table."""


def page(template: str, title: str, kind: str = "", head: str = "", **parts: str) -> str:
    """One self-contained page: the template's parts in the frame that all pages have; `kind` is the body's class."""
    body = _template(template).substitute(parts)
    return _template("page.html").substitute(title=escape(title), kind=kind, head=head, body=body)


def _template(name: str) -> Template:
    return Template(Path(__file__).with_name(name).read_text("utf-8"))


def figure(caption: str, drawn: str, kind: str = "", below: str = "") -> str:
    """A caption, text, above what is drawn; `below` it in small letters is HTML."""
    small = f"<br><small>{below}</small>" if below else ""
    return f'<figure class="{kind}"><figcaption>{escape(caption)}{small}</figcaption>{drawn}</figure>'


def image(content: bytes, alt: str) -> str:
    """A PNG or JPEG file, inline."""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{b64encode(content).decode()}">'


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Of HTML; it scrolls by itself where it is too wide."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'
    )


def curve_figure(
    runs: Mapping[str, Lines],
    name: str,
    caption: str,
    steps: Point | None = None,
    level: float | None = None,
    beside: str | None = None,
    best: Mapping[str, int] | None = None,
) -> str:
    """One number of every run that has it, a line each, with its last value; "" where no value is finite.

    `steps` are the ends of the lower axis, by default those of the lines. The number `beside` it is drawn dashed in the
    same colours, and at the `best` step of a run there is a ring.
    """
    curves, told = list[Curve](), list[str]()
    for colour, (run, lines) in enumerate(runs.items()):
        points, others = (_points(lines, each) for each in (name, beside))
        curves.append(Curve(points, colour, best=(best or {}).get(run)))
        curves.append(Curve(others, colour, dashed=True))
        lasts = " and ".join(number(each[-1][1]) for each in (points, others) if each)
        named = f'<b class="c{colour % MAX_COLOURS}">{escape(run)}</b>' if len(runs) > 1 else "last"
        told += [f"{named} {lasts}"] if lasts else []
    drawn = picture([curve for curve in curves if curve.points], caption, level, steps)
    return figure(caption, drawn, "curve", " · ".join(told)) if drawn else ""


def _points(lines: Lines, name: str | None) -> list[Point]:
    return [(line["step"], line[name]) for line in lines if name in line] if name else []
