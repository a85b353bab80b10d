"""Curves as a browser gets them: what is thinned keeps its spikes, and axes their promises."""

import math
import random
import re
from statistics import median

import pytest

from fewstep.evaluation.curves import HEIGHT, WIDTH, Axis, Curve, medians, noisy, number, picture, thinned

NOISE = random.Random(0)
LONG = [(float(step), 1 + NOISE.gauss(0, 0.1)) for step in range(1, 10_001)]


def paths(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    """The points of every line of that class."""
    found = re.findall(rf'<path class="{kind}[^"]*" d="M([^"]*)"', svg)
    return [[tuple(map(float, point.split())) for point in path.split("L")] for path in found]


def texts(svg: str) -> list[str]:
    return re.findall("<text[^>]*>([^<]*)</text>", svg)


def test_a_spike_of_one_step_in_ten_thousand_stays_at_its_place() -> None:
    points = list(LONG)
    points[4321], points[77] = (4322.0, 9.0), (78.0, -7.0)
    kept = thinned(points, 100)
    assert len(kept) <= 202
    assert {(4322.0, 9.0), (78.0, -7.0), points[0], points[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert thinned(points[:200], 100) == points[:200]


def test_the_median_is_that_of_the_points_around() -> None:
    found = medians(LONG)
    assert len(found) == 100
    for index in (0, 40, 99):
        at = round(index * 9999 / 99)
        assert found[index] == (LONG[at][0], median(value for _, value in LONG[max(0, at - 166) : at + 167]))
    assert medians(LONG[:1]) == LONG[:1]


@pytest.mark.parametrize(
    ("values", "is_noisy"),
    [
        ([math.sin(k / 30) for k in range(200)], False),
        ([(-1) ** k for k in range(200)], True),
        ([0.5**k for k in range(100)], False),
        ([1.0] * 100, False),
        ([(-1) ** k for k in range(20)], False),  # too few to be smoothed
    ],
)
def test_what_is_noisy(values: list[float], is_noisy: bool) -> None:
    points = [(float(step), float(value)) for step, value in enumerate(values)]
    assert noisy(points, log=False) is is_noisy
    svg = picture([Curve(points)], "x")
    assert len(paths(svg, "line")) == 1 + is_noisy
    assert ("raw" in svg) is is_noisy


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 1, 0, 100), [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (Axis(-3, 7, 0, 100), [-2, 0, 2, 4, 6]),
        (Axis(1.0, 1.1, 0, 100), [1, 1.02, 1.04, 1.06, 1.08, 1.1]),
        (Axis(3e-4, 2.0, 0, 100, log=True), [1e-3, 1e-2, 1e-1, 1]),
        (Axis(1e-12, 1.0, 0, 100, log=True), [1e-12, 1e-9, 1e-6, 1e-3, 1]),
        (Axis(1.0, 1000.0, 0, 100), [200, 400, 600, 800, 1000]),
    ],
)
def test_ticks_are_round_and_few(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks == pytest.approx(ticks, abs=1e-12)


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.1), (0.0, 3e-4), (-5e-7, 5e-7), (1e6, 1.001e6), (999.0, 1000.4), (-3e4, 5e4), (0.1, 0.7)]
)
def test_numbers_at_an_axis_are_those_of_its_lines(low: float, high: float) -> None:
    """Read back, they are apart by one round number and lie where they say."""
    svg = picture([Curve([(0.0, low), (1.0, high)])], "x")
    told = re.findall('y="([0-9.]+)" text-anchor="end">([^<]*)<', svg)
    values, places = [float(text.replace(",", "")) for _, text in told], [float(y) - 3.5 for y, _ in told]
    (line,) = paths(svg, "line")
    per_pixel = (high - low) / (line[0][1] - line[1][1])
    assert len(values) >= 3
    for value, place in zip(values, places, strict=True):
        assert value == pytest.approx(low + per_pixel * (line[0][1] - place), abs=0.2 * per_pixel)
    assert max(len(text) for _, text in told) <= 9


def test_a_point_lies_where_the_ticks_say() -> None:
    """Values and pixels are compared by the numbers beside the axis."""
    points = [(float(step), 10.0 ** (step / 10)) for step in range(41)]  # 1 to 10,000: logarithmic
    svg = picture([Curve(points)], "x")
    where = {text: float(y) - 3.5 for y, text in re.findall('y="([0-9.]+)" text-anchor="end">([^<]*)<', svg)}
    assert list(where) == ["1", "10", "100", "1,000", "10,000"]
    (line,) = paths(svg, "line")
    for power, y in enumerate(where.values()):
        assert line[10 * power][1] == pytest.approx(y, abs=0.11)
    assert "e" not in "".join(texts(picture([Curve([(1.0, -1.0), (2.0, 5000.0)])], "x")))  # not logarithmic


def test_one_huge_value_among_many_is_told_and_leaves_the_rest_readable() -> None:
    points = [(float(k), math.sin(k / 9)) for k in range(300)]
    points[100] = (100.0, -1e6)
    svg = picture([Curve(points)], "x")
    assert "to -1e6" in texts(svg)
    ys = [y for _, y in paths(svg, "line")[0]]
    assert max(ys) - min(ys[:90]) > 50
    assert all(0 <= y <= HEIGHT for y in ys)


def test_what_is_not_finite_is_marked_and_not_drawn() -> None:
    points = [(1.0, 1.0), (2.0, math.nan), (3.0, 2.0), (4.0, math.inf), (5.0, -math.inf), (6.0, 3.0)]
    svg = picture([Curve(points)], "x")
    assert len(paths(svg, "line")[0]) == 3
    assert re.search('class="broken" d="([^"]*)"', svg)[1].count("M") == 3
    assert not re.search("nan|inf", svg)
    assert picture([Curve([(1.0, math.nan)])], "x") == ""
    assert picture([], "x") == ""
    assert len(paths(picture([Curve([(1.0, 1e308), (2.0, -1e308), (3.0, 5e-324), (4.0, 1e299)])], "x"), "line")[0]) == 2


def test_one_point_a_level_line_and_a_best_one_can_be_seen() -> None:
    svg = picture([Curve([(5.0, 2.0)], best=5), Curve([(5.0, 0.0)], colour=9, dashed=True)], "<x>", level=1.0)
    assert svg.count("<circle") == 1
    assert svg.count('class="dots c0"') == svg.count('class="dots c1"') == 1
    assert 'class="level"' in svg
    assert 'aria-label="&lt;x&gt;"' in svg
    assert "line c1 dashed" in svg
    assert 'class="level"' not in picture([Curve([(1.0, 100.0), (2.0, 101.0)])], "x", level=1.0)  # too far to be of use


def test_ten_thousand_points_are_few_bytes_and_lie_in_the_picture() -> None:
    svg = picture([Curve(LONG)], "x")
    assert len(svg) < 12_000
    for line in paths(svg, "line"):
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line)


def test_lines_of_other_lengths_share_their_axes() -> None:
    svg = picture([Curve(LONG[:5000]), Curve(LONG, colour=1)], "x")
    short, long = (max(x for x, _ in line) for line in paths(svg, "line")[:2])
    kinds = re.findall('path class="line ([^"]*)"', svg)
    assert kinds == ["c0 raw", "c1 raw", "c0", "c1"]  # no noise over another's median
    assert (short - 44) / (long - 44) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (12345.6, "12,346"), (1e-5, "1e-5"), (1.5e6, "1.5e6"), (math.nan, "–"), (0.0, "0")],
)
def test_numbers_have_three_digits_that_count(value: float, text: str) -> None:
    assert number(value) == text
