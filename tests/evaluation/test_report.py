"""The table as JSON, text and one page that needs nothing but itself."""

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from browser import check_page, needs_chromium
from fewstep.evaluation.report import BESIDE, Row, cell, columns, text_table, write_json, write_page
from fewstep.metric_table import METRICS
from fewstep.pictures import grid, png_bytes

SCORES = ["fid", "kid", "precision", "recall", "accuracy", "images_per_second"]
KEYS = ["model", "sampler", "nfe", *SCORES]
PICTURE = png_bytes(grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), columns=2))


def row(model: str, sampler: str | None, nfe: int | None, *values: float, **more: object) -> Row:
    return Row(model, sampler, nfe, dict(zip(SCORES, values, strict=False)), grid=PICTURE, **more)


REAL = row("real", None, None, 0.1, 0.00012, 0.99, 0.98, 0.97)
TEACHER = row("teacher", "heun 18", 35, 0.5, 0.0031, 0.9, 0.8, 0.96, 123.4)
STUDENT = row("student", "student", 1, 0.7, 0.0042, 0.95, 0.7, 0.95, 4321.0)
ROWS = [REAL, TEACHER, STUDENT]
CURVE = {"run": [{"step": 1, "denoising_loss": 0.5}, {"step": 2, "denoising_loss": 0.4, "logit_gap": 0.1}]}
SHOWN = [
    ["real", "–", "–", "0.100", "0.00012", "0.990", "0.980", "0.970", "–"],
    ["teacher", "heun 18", "35", "0.500", "0.0031", "0.900", "0.800", "0.960", "123"],
    ["student", "student", "1", "0.700", "0.0042", "0.950", "0.700", "0.950", "4,321"],
]


class Page(HTMLParser):
    """What a browser would see: the cells of each row, the text, and everything that it would have to load."""

    def __init__(self, html: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.best: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.is_best = ("class", "best") in attributes

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1] in ("td", "th") and data.strip():
            self.rows[-1][-1] += data
            if self.is_best:
                self.best.append(data)


def page_of(
    tmp_path: Path, rows: list[Row] = ROWS, curves: dict | None = None, title: str = "title", **facts: object
) -> Page:
    path = tmp_path / "report.html"
    write_page(rows, curves or {}, path, title, "label", facts.pop("features", "classifier"), facts)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return Page(path.read_text())


def test_the_page_loads_nothing_for_its_pictures_are_in_it(tmp_path: Path) -> None:
    page = page_of(tmp_path, curves=CURVE)
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|url\((?!#)|@import|file:", html)
    assert not {"script", "link", "iframe", "object", "metadata"} & set(page.tags)
    grids = [source for source in page.loads if not source.startswith("#")]
    assert all(source.startswith("data:image/png;base64,") for source in grids)
    assert [base64.b64decode(source.partition(",")[2]) for source in grids] == [PICTURE] * 3
    assert "student, student (nfe 1)" in page.text


def test_curves_are_of_what_the_runs_have_in_the_colour_of_the_text(tmp_path: Path) -> None:
    page = page_of(tmp_path, curves=CURVE)
    assert "Training" in page.text
    html = (tmp_path / "report.html").read_text()
    assert page.tags.count("svg") == 2
    assert page.text.index("denoising loss") < page.text.index("mean logit of reals minus fakes")
    drawn = "".join(re.findall("<svg.*?</svg>", html))
    assert not re.search("style|stroke=|fill=|#", drawn)  # colours are the page's own, light or dark


@pytest.mark.parametrize(
    ("lines", "panels"),
    [
        ({"teacher": [{"step": 1, "denoising_loss": 1.0, "grad_norm": 2.0, "learning_rate": 0.1}]}, 2),
        ({"autoencoder": [{"step": k, "squared_error": 1 / k, "kl": 0.0} for k in range(1, 4000)]}, 2),
        ({"a": [{"step": 1, "fid": math.nan}, {"step": 2, "fid": 3.0}], "b": []}, 1),
        ({"a": [{"step": 1, "learning_rate": 1.0}]}, 0),
        ({"a": [dict.fromkeys(BESIDE, 1.0) | {"step": 1}]}, 4),
    ],
)
def test_a_teacher_and_an_autoencoder_have_curves_of_their_own(tmp_path: Path, lines: dict, panels: int) -> None:
    assert page_of(tmp_path, curves=lines).tags.count("svg") == panels
    assert (tmp_path / "report.html").stat().st_size < 200_000


def test_data_seed_and_command_are_named(tmp_path: Path) -> None:
    page = page_of(tmp_path, data="<photos>", seed=3, command="fewstep evaluate x")
    assert "data: <photos>" in page.text
    assert "seed: 3" in page.text
    assert "command: fewstep evaluate x" in page.text


def test_the_page_has_every_key_of_every_row_and_no_section_for_what_there_is_not(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert len(page.loads) == 3
    assert "…" not in page.text
    assert "Training" not in page.text
    assert page.rows[0] == [key.replace("_", " ") for key in KEYS]
    assert page.rows[1:] == SHOWN


def written(tmp_path: Path, rows: list[Row]) -> list[dict]:
    """results.json, the only new file."""
    before = {*tmp_path.iterdir()}
    write_json(rows, tmp_path / "results.json")
    assert {*tmp_path.iterdir()} - before == {tmp_path / "results.json"}
    return json.loads((tmp_path / "results.json").read_text())


def test_intervals_stand_below_their_values_and_in_the_file(tmp_path: Path) -> None:
    told = replace(STUDENT, intervals={"fid": (0.6, 0.8)})
    assert "0.600 … 0.800" in page_of(tmp_path, [REAL, told]).text
    rows = written(tmp_path, [REAL, told])
    assert [row["intervals"] for row in rows] == [None, {"fid": [0.6, 0.8]}]
    assert [row["interval_kinds"] for row in rows] == [{"fid": "jackknife"}] * 2


def test_the_best_model_of_each_column_is_marked_and_real_images_do_not_compete(tmp_path: Path) -> None:
    assert page_of(tmp_path).best == ["0.500", "0.0031", "0.800", "0.960", "0.950", "4,321"]


def test_of_one_model_nothing_is_the_best(tmp_path: Path) -> None:
    assert not page_of(tmp_path, [REAL, STUDENT]).best


def test_names_are_escaped(tmp_path: Path) -> None:
    nasty = '<script>alert("&")</script>$title'
    facts = {"features": nasty, "command": nasty}
    page = page_of(
        tmp_path, [replace(TEACHER, model=nasty)], {nasty: CURVE["run"], "b": CURVE["run"]}, title=nasty, **facts
    )
    assert "script" not in page.tags
    assert page.rows[1][0] == nasty
    assert page.text.count(nasty) == 8  # title and heading, row, features, command, caption, legends of two curves


def test_json_has_exactly_the_keys_of_the_table(tmp_path: Path) -> None:
    rows = written(tmp_path, ROWS)
    assert [list(row) for row in rows] == [KEYS] * 3
    assert [list(row.values()) for row in rows] == [
        ["real", None, None, *REAL.values.values(), None],
        ["teacher", "heun 18", 35, *TEACHER.values.values()],
        ["student", "student", 1, *STUDENT.values.values()],
    ]


def test_the_text_table_shows_the_same_numbers_but_those_kept_out_of_it() -> None:
    lines = printed(ROWS)
    assert lines[0].split() == [*(key for key in KEYS[:-1] if key != "kid"), "images/s"]
    assert [line.split() for line in (lines[2], lines[4])] == [
        ["real", "–", "–", "0.100", "0.990", "0.980", "0.970", "–"],
        ["student", "student", "1", "0.700", "0.950", "0.700", "0.950", "4,321"],
    ]


def printed(rows: list[Row]) -> list[str]:
    console = Console(width=100, file=io.StringIO())
    console.print(text_table(rows))
    return [line for line in console.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]


def test_the_table_of_classes_fits_into_80_columns() -> None:
    rows = [replace(TEACHER, model="digits-teacher"), replace(STUDENT, model="digits-4step")]
    assert max(len(line.rstrip()) for line in printed(rows)) <= 78


def test_the_table_of_prompts_leaves_out_what_does_not_fit_but_never_all_beside_fid() -> None:
    values = dict.fromkeys(METRICS, 12.345) | {"scorer": 1.0}
    heads = [printed([replace(STUDENT, values=values, model=name)])[0].split() for name in ("shapes-4step", "x" * 60)]
    least = ["model", "sampler", "nfe", "fid", "patch", "precision"]
    assert heads == [[*least, "recall", "clip"], least]
    assert columns([replace(STUDENT, values=values)])[-1] == "scorer"


def test_the_best_is_by_the_way_that_is_better_of_what_is_signed_and_of_what_no_row_of_metrics_knows(
    tmp_path: Path,
) -> None:
    shares = ({"brightness": -0.01, "scorer": 2.0}, {"brightness": 0.02, "scorer": 5.0})
    page = page_of(tmp_path, [replace(STUDENT, values=values) for values in shares])
    assert page.best == ["-0.010", "5.000"]
    assert page.rows[2][-2:] == ["+0.020", "5.000"]
    html = (tmp_path / "report.html").read_text()
    assert '<th class="zero">brightness</th><th>scorer</th>' in html
    assert "<b>brightness</b>: " in html
    assert "<b>fid</b>" not in html  # which no row has


@pytest.mark.parametrize(
    ("speed", "text"), [(0.0321, "0.0321"), (9.87, "9.87"), (99.4, "99.4"), (1234.5, "1,234"), (98765.0, "98,765")]
)
def test_a_slow_speed_keeps_its_digits(speed: float, text: str) -> None:
    assert cell("images_per_second", speed) == text


def test_what_no_row_has_is_no_column() -> None:
    bare = row("teacher", "ddim 50", 50, 0.5)
    assert columns([bare]) == ["model", "sampler", "nfe", "fid"]
    told = replace(bare, values={"prompt_accuracy": 0.0}, attributes={"two_objects": {"shape": 0.5}})
    assert columns([bare, told]) == ["model", "sampler", "nfe", "fid", "prompt_accuracy"]


def test_attributes_are_in_the_json_and_in_a_table_of_their_own(tmp_path: Path) -> None:
    told = replace(STUDENT, attributes={"two_objects": {"shape": 0.25, "colour": 0.75}})
    page = page_of(tmp_path, [REAL, told])
    rows = written(tmp_path, [REAL, told])
    assert [row["attributes"] for row in rows] == [None, {"two_objects": {"shape": 0.25, "colour": 0.75}}]
    assert "attributes" not in page.rows[0]
    assert "two objects, attribute by attribute" in page.text
    assert page.text.count("0.250") == page.text.count("0.750") == 1


@needs_chromium
def test_a_browser_shows_it_on_a_telephone_and_in_the_dark_without_a_word_of_complaint(tmp_path: Path) -> None:
    rows = [replace(TEACHER, model="a-model-of-a-very-long-name@best-prompt_accuracy", intervals={"fid": (0.4, 0.6)})]
    page_of(tmp_path, [*ROWS, *rows], CURVE, data="x" * 300, command="fewstep evaluate " + 30 * "runs/digits-1step ")
    check_page(tmp_path / "report.html")


def test_wide_tables_scroll_in_a_box_of_their_own(tmp_path: Path) -> None:
    page_of(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert html.count("<table>") == html.count('<div class="wide" tabindex="0"><table>') == html.count("</table></div>")
    assert all(
        rule in html for rule in ("overflow-x: auto", "prefers-color-scheme: dark", 'content="width=device-width')
    )
