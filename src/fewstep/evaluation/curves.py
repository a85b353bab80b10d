"""Curves of runs as SVG, drawn by hand: axes, lines thinned so that a spike of one step stays, running medians.

Their colours are classes of the page's style, c0 to c7, so that they are right on light and on dark ground.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from statistics import median, quantiles
from typing import NamedTuple

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 20  # margins; numbers stand in those at the left and below
MAX_COLOURS = 8
BUCKETS = 300  # of a line, each with its lowest and its highest point
MEDIANS = 100  # points of a running median
DECADES = 2  # beyond so many, of numbers above 0, the axis is logarithmic
MOST = 1e300  # beyond it the ends of an axis have no difference that is a number
Point = tuple[float, float]


class Curve(NamedTuple):
    """One line: (step, value) in the order of steps; what is not finite is marked below."""

    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False
    best: int | None = None  # the step that is ringed


class Axis(NamedTuple):
    """From low at pixel `start` to high at pixel `end`; numbers beyond are drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = map(math.log10, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[float]:
        """At most six round numbers, of a logarithmic axis powers of ten."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1, -(-(last - first + 1) // 6))]
        rough = (self.high - self.low) / 5
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * each for each in (1, 2, 5, 10) if size * each >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * number for number in range(first, last + 1)]


def picture(curves: Sequence[Curve], label: str, level: float | None = None, steps: Point | None = None) -> str:
    """The SVG; "" where no point is finite. `level` is a line to compare with, `steps` the ends of the lower axis.

    Where the values span more than two decades, all above 0, the axis is logarithmic. Where they are noisy a running
    median stands over them.
    """
    finite = [[point for point in curve.points if abs(point[1]) < MOST] for curve in curves]
    values = [value for points in finite for _, value in points]
    if not values:
        return ""
    y, beyond = _value_axis(values, level)
    given = steps or (min(points[0][0] for points in finite if points), max(p[-1][0] for p in finite if p))
    x = Axis(given[0], given[1] if given[1] > given[0] else given[0] + 1, LEFT, WIDTH - RIGHT)
    buckets = BUCKETS if len(curves) < 3 else BUCKETS // 2
    drawn = [_drawn(curve, points, x, y, buckets) for curve, points in zip(curves, finite, strict=True)]
    lines = [*(below for below, _ in drawn), *(above for _, above in drawn)]
    told = f'<text x="{LEFT + 4}" y="{TOP + 8}">{escape(beyond)}</text>' if beyond else ""
    near = [y.at(level)] if level is not None and y.low <= level <= y.high else []
    across = [f'<path class="level" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>' for at in near]
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    return "".join([head, *_frame(x, y), *across, *lines, told, "</svg>"])


def _value_axis(values: list[float], level: float | None) -> tuple[Axis, str]:
    """Of all values, and what is told of those beyond: a spike leaves the rest readable."""
    low, high = min(values), max(values)
    if low > 0 and high > low * 10**DECADES:
        return Axis(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, log=True), ""
    told, beyond = (low, high), ""
    if len(values) >= 50:
        inner = quantiles(values, n=50)
        room = max(inner[-1] - inner[0], 1e-9 * max(map(abs, inner)))
        low, high = max(low, inner[0] - 3 * room), min(high, inner[-1] + 3 * room)
        beyond = ", ".join(number(each) for each, end in zip(told, (low, high), strict=True) if each != end)
    # A level is shown where it is near: else it would flatten the curve.
    near = level is not None and low - (high - low) <= level <= high + (high - low)
    low, high = (min(low, level or 0.0), max(high, level or 0.0)) if near else (low, high)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - room, high + room, HEIGHT - BOTTOM, TOP), f"to {beyond}" if beyond else ""


def _frame(x: Axis, y: Axis) -> Iterable[str]:
    """Grid and numbers."""
    values = y.ticks
    between = 0.0 if y.log or len(values) < 2 else values[1] - values[0]
    for value in values:
        yield f'<path class="grid" d="M{LEFT} {y.at(value)}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 4}" y="{y.at(value) + 3.5}" text-anchor="end">{_told(value, between)}</text>'
    for step in x.ticks:
        yield f'<text x="{x.at(step)}" y="{HEIGHT - 5}" text-anchor="middle">{_short(step)}</text>'


def _drawn(curve: Curve, points: list[Point], x: Axis, y: Axis, buckets: int) -> tuple[str, str]:
    """The noisy line of a running median, which lies below the medians of all curves, and what lies above.

    Few points are dots, too, and what is not finite is marked at the lower axis.
    """
    colour = f"c{curve.colour % MAX_COLOURS}"
    dashed = " dashed" if curve.dashed else ""
    middle = medians(points) if noisy(points, y.log) else []
    whole = _path(thinned(points, buckets), x, y)
    below = f'<path class="line {colour} raw" d="{whole}"/>' if middle else ""
    parts = [f'<path class="line {colour}{dashed}" d="{_path(middle, x, y) if middle else whole}"/>']
    if len(points) <= 30:
        dots = "".join(f"M{x.at(step)} {y.at(value)}h0" for step, value in points)
        parts.append(f'<path class="dots {colour}" d="{dots}"/>')
    parts += [f'<circle class="{colour}" cx="{x.at(s)}" cy="{y.at(v)}" r="5"/>' for s, v in points if s == curve.best]
    if broken := sorted({round(x.at(step)) for step, value in curve.points if not abs(value) < MOST}):
        parts.append(f'<path class="broken" d="{"".join(f"M{at} {HEIGHT - BOTTOM}v-6" for at in broken)}"/>')
    return below, "".join(parts)


def _path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """M and then L between all points; "" of none."""
    return "M" + "L".join(f"{x.at(step):g} {y.at(value):g}" for step, value in points) if points else ""


def thinned(points: Sequence[Point], buckets: int = BUCKETS) -> list[Point]:
    """Of each of so many equal parts of the points the lowest and the highest, in order; first and last stay."""
    if len(points) <= 2 * buckets:
        return list(points)
    size = -(-len(points) // buckets)
    parts = (points[first : first + size] for first in range(0, len(points), size))
    ends = ((min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])) for part in parts)
    return sorted({points[0], points[-1], *(point for pair in ends for point in pair)})


def medians(points: Sequence[Point], num: int = MEDIANS) -> list[Point]:
    """Evenly spaced, each over a thirtieth of the points around it."""
    half, last = max(2, len(points) // 60), len(points) - 1
    centres = sorted({round(index * last / (num - 1)) for index in range(num)})
    return [(points[at][0], median(value for _, value in points[max(0, at - half) : at + half + 1])) for at in centres]


def noisy(points: Sequence[Point], log: bool) -> bool:
    """Whether a line goes up and down by 5 times its range, on the axis that it is drawn on."""
    values = [math.log(value) if log else value for _, value in points]
    return len(values) >= 30 and sum(abs(b - a) for a, b in pairwise(values)) > 5 * (max(values) - min(values))


def number(value: float) -> str:
    """Three digits that count."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e5 else f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def _told(value: float, between: float) -> str:
    """A tick, with the digits that tell it from the next."""
    if not between:
        return number(value)
    if between >= 1 and abs(value) < 1e5:
        return f"{value:,.0f}"
    digits = math.floor(math.log10(max(abs(value), between)) + 1e-9) - math.floor(math.log10(between) + 1e-9) + 1
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def _short(step: float) -> str:
    """A step as an axis has room for it: 12.5k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(step) >= size:
            return f"{step / size:g}{unit}"
    return f"{step:g}"
