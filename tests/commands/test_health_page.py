"""`fewstep report`: the page of runs that are whole, that go on, that lack things, and that are damaged."""

import json
import math
import os
import random
import re
from pathlib import Path
from struct import pack
from zlib import crc32

import pytest
from PIL import Image

from browser import check_page, needs_chromium
from command_line import fewstep, refused
from fewstep.evaluation.findings import Finding
from fewstep.evaluation.health_page import PICTURE_BYTES, evenly, shrunk
from fewstep.recipes.loading import dump, load_recipe
from fewstep.runtime.tracking import to_line

FOUND = [
    Finding("well", "FID falls", "1.0 after 2.0", "go on", "fid", 1.0, 2.0, 40),
    Finding("ill", "The critic lags <far>", "gap 0.31, above 0.24", "student_every: 5 -> 10", "gap", 0.31, 0.24, 1234),
]
LEFT_OUT = "Left out, for it can't be read: "


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fewstep.commands.report.find", lambda lines, evaluations, recipe: FOUND)


def line(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "gap": 0.1 + 1 / step, "dm_norm": 1.0, "cfg_norm": 2.0, "new_number": 7.0, **more}


def make_run(
    name: str, steps: range = range(10, 101, 10), recipe: str = "digits-4step", settings: tuple[str, ...] = (), **more
) -> Path:
    """A run folder of these steps, of 100."""
    run = Path(name)
    (run / "samples").mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump(load_recipe(recipe, ["num_steps=100", *settings])))
    (run / "metrics.jsonl").write_text("".join(to_line(line(step, **more)) for step in steps))
    return run


def judge(run: Path, **scores: list[float]) -> None:
    """Evaluations at 20, 40, 60 ..."""
    lines = [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]
    told = "".join(to_line({"step": 20 * (index + 1), **each}) for index, each in enumerate(lines))
    (run / "evaluations.jsonl").write_text(told)


def draw(run: Path, step: int, size: tuple[int, int] = (16, 8), folder: str = "samples") -> Path:
    path = run / folder / f"{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (step % 250, 90, 200)).save(path)
    return path


def page_of(line: str = "run", out: str = "run/report.html") -> str:
    """The page that the command wrote."""
    assert fewstep(f"report {line}") == (0, f"wrote {out}\n", "")
    return Path(out).read_text()


def shown(page: str, kind: str = "png") -> int:
    return page.count(f"data:image/{kind};base64,")


def sentences(page: str) -> str:
    """What a reader sees, without pictures and style."""
    plain = re.sub("<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL)
    return " ".join(plain.split())


# --- what the page says ----------------------------------------------------------------------------------------------


def test_the_head_has_state_and_best_and_the_findings_come_next_the_worst_first() -> None:
    run = make_run("run", range(10, 51, 10), seconds_per_step=2.0)
    judge(run, fid=[3.0, 1.25, 2.0], brightness=[0.3, -0.4, -0.1], accuracy=[0.5, 0.75, math.nan])
    (run / "checkpoints" / "00000040").mkdir(parents=True)
    text = sentences(page_of())
    assert "steps 60 of 100 stopped; --resume goes on" in text  # an evaluation was behind the last line
    (run / ".lock").touch()
    assert "steps 60 of 100 goes on, about 0:01:20 left" in sentences(page_of())
    assert "seconds per step 2 " in text
    assert "fid ↓ 1.250 @40, kept" in text
    assert "brightness → 0 -0.100 @60 " in text
    assert "accuracy ↑ 0.750 @40, kept" in text
    assert "1 ill, 0 to watch, 1 well" in text
    told = ["✗ Ill. The critic lags &lt;far&gt;", "gap 0.31, above 0.24 (step 1,234)", "student_every: 5 -&gt; 10"]
    places = [text.index(each) for each in (*told, "✓ Well. FID falls", "Judged on the way", "Teacher against critic")]
    assert places == sorted(places)


def test_every_number_is_drawn_once_with_its_last_value_also_one_that_no_group_knows() -> None:
    make_run("run", denoising_loss=0.75, skipped_critic=2.0, student_grad_norm=1e-7)
    page = page_of()
    text = sentences(page)
    assert page.count("<svg") == 6  # cfg_norm is beside dm_norm
    for told in ("last 0.11", "last 1 and 2", "last 0.75", "skipped critic last 2", "student last 1e-7"):
        assert told in text
    assert text.index("Further numbers") < text.index("new number last 7")
    assert text.count("new number") == 1


def test_settings_are_those_that_are_not_the_defaults() -> None:
    make_run("run", settings=("student_every=7", "gan.critic_weight=0.5"), recipe="digits-1step")
    text = sentences(page_of())
    assert "student_every 7 5" in text
    assert "gan.critic_weight 0.5 0.01" in text
    assert "max_skipped" not in text
    assert "description" not in text


def test_several_runs_lie_over_each_other_with_what_differs() -> None:
    for name, lr in (("a/run", 1e-3), ("b/run", 2e-3)):
        judge(make_run(name, settings=(f"student.optimizer.lr={lr}",)), fid=[2e3 * lr, 4e3 * lr])
    make_run("teacher", recipe="digits-teacher")
    page = page_of("a/run b/run@40 teacher", "report.html")
    text = sentences(page)
    assert "<title>a/run, b/run@40, teacher</title>" in page
    assert all(f"a/run {value} · b/run@40 {other} · teacher {value}" in text for value, other in (("0.11", "0.125"),))
    assert "student.optimizer.lr 0.001 0.002 –" in text
    assert text.count("1 well. The critic lags") == 3  # above what is folded
    assert "class_dropout – – 0.0" in text
    assert '<span class="first">2.000<small>@20</small></span>' in page
    assert "4.000 @20 –" in text
    assert re.search(r'class="line c2[ "]', page)
    judge(Path("teacher"), fid=[3.0])
    assert fewstep("report a/run teacher")[1] == "wrote report-2.html\n"
    assert fewstep("report a/run teacher --overwrite --out report.html")[0] == 0
    assert "teacher" in Path("report.html").read_text()


@pytest.mark.parametrize(("asked", "last"), [("run@45", 40), ("run@best-fid", 40), ("run@100", 100)])
def test_a_run_up_to_a_step(asked: str, last: int) -> None:
    run = make_run("run")
    judge(run, fid=[3.0, 1.0, 2.0, 5.0])
    for step in (20, 40, 60, 100):
        draw(run, step)
    page = page_of(asked)
    assert shown(page) == sum(step <= last for step in (20, 40, 60, 100))
    assert f"{last} of 100 shown up to {asked.partition('@')[2].replace('best-fid', '40')}" in sentences(page)


def test_the_page_loads_nothing_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw(make_run("<i>", settings=("device=cpu", "data.source='<script>'")), 10)
    page = page_of("'<i>'", "<i>/report.html")
    assert not re.search(r"https?://|url\(|@import|file:|<script|<link|<i>|refresh", page)
    assert "&lt;script&gt;" in page


# --- what a run may lack ---------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_has_its_page() -> None:
    run = make_run("run", range(10, 31, 10))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "gap": 0.')
    with (run / "evaluations.jsonl").open("a") as file:
        file.write('{"step"')
    text = sentences(page_of())
    assert "30 of 100" in text
    assert "none yet" in text
    assert "Not judged on the way: evaluation.every is how often." in text
    assert "Samples" not in text


@pytest.mark.parametrize("recipe", ["digits-teacher", "shapes-autoencoder", "shapes-teacher", "sdxl-1step-init"])
def test_runs_of_every_kind_have_pages(recipe: str) -> None:
    needed = {"shapes-teacher": "model.autoencoder=x", "sdxl-1step-init": "regression.pairs=x"}.get(recipe)
    make_run("run", recipe=recipe, settings=(needed,) if needed else ())
    assert "teacher" in page_of() or recipe == "shapes-autoencoder"


def test_numbers_that_are_not_finite_are_marked_and_break_nothing() -> None:
    run = make_run("run", broken=math.nan, torn=math.inf)
    judge(run, fid=[math.nan, 1.0])
    page = page_of()
    assert page.count('class="broken"') == 1  # of fid; what is never finite has no picture
    assert "NaN" not in page


def png_header(width: int, height: int) -> bytes:
    """A PNG of so many pixels in 60 bytes."""
    chunk = b"IHDR" + pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + pack(">I", 13) + chunk + pack(">I", crc32(chunk)) + pack(">I", 0) + b"IDAT"


@pytest.mark.parametrize(
    "content", [b"", b"no picture", png_header(9000, 9000), png_header(60_000, 60_000), "cut", "fifo"]
)
def test_a_picture_that_cannot_be_read_is_left_out_and_named(content: bytes | str) -> None:
    run = make_run("run")
    for step in (20, 60):
        draw(run, step)
    bad = draw(run, 40, (400, 400))
    if content == "fifo":
        bad.unlink()
        os.mkfifo(bad)
    else:
        bad.write_bytes(bad.read_bytes()[:300] if content == "cut" else content)
    draw(run, 60, (30, 10), "panels")
    page = page_of()
    assert shown(page) == 3
    assert f"{LEFT_OUT}00000040.png (" in sentences(page)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("report nothing", "nothing: no such run folder; name one that"),
        ("report empty", "empty: not a run folder (it has no recipe.yaml)"),
        ("report young", "young/metrics.jsonl: has no line yet; the first comes behind step 25 (log_every)"),
        ("report run@5", "run/metrics.jsonl: has no line up to step 5 yet"),
        ("report run@best-fid", "run: has no step @best-fid; it has @STEP"),
        ("report damaged", "damaged/metrics.jsonl: can't be read; remove it"),
        ("report run run", "run: is named twice"),
        ("report run --out page", "--out page: a page's name ends in .html"),
        ("report run --out there.html", "--out there.html: exists already; replace it with --overwrite"),
        ("report run --out there.html/x.html", "--out: there.html is not a folder"),
        (f"report {' '.join(f'r{index}' for index in range(9))}", "9 runs; take at most 8"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(line: str, told: str) -> None:
    make_run("run")
    make_run("young", range(0), settings=("log_every=25",))
    (make_run("damaged") / "metrics.jsonl").write_text('{"no step": 1}\n')
    Path("empty").mkdir()
    Path("there.html").touch()
    before = sorted(Path().rglob("*"))
    refused(fewstep(line), told)
    assert sorted(Path().rglob("*")) == before


# --- as a run goes on ------------------------------------------------------------------------------------------------


def test_a_watched_page_follows_the_run_to_its_end_and_writes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("run", range(0))
    (run / ".lock").touch()
    there = {*(path.name for path in run.iterdir()), "report.html"} - {".lock"}
    pages, states = [], iter([range(10, 51, 10), range(10, 101, 10), None])

    def wait(seconds: float) -> None:
        pages.append((seconds, (run / "report.html").read_text()))
        assert {path.name for path in run.iterdir()} - {".lock"} == there
        steps = next(states)
        if steps is None:
            (run / ".lock").unlink()
        else:
            (run / "metrics.jsonl").write_text("".join(to_line(line(step)) for step in steps))

    monkeypatch.setattr("time.sleep", wait)
    assert fewstep("report run --watch --every 5") == (0, "wrote run/report.html\n", "")
    assert [seconds for seconds, _ in pages] == [5, 5, 5]
    assert all('<meta http-equiv="refresh" content="5">' in page for _, page in pages)
    assert [re.search(r"(\d+) of 100", page)[1] for _, page in pages] == ["0", "50", "100"]
    assert "refresh" not in (run / "report.html").read_text()


def test_ctrl_c_ends_a_watch_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    make_run("run", range(10, 51, 10))
    monkeypatch.setattr("time.sleep", stop)
    told = "fewstep: stopped; run/report.html is as of the last step that it read\n"
    assert fewstep("report run --watch") == (130, "wrote run/report.html\n", told)


# --- sizes -----------------------------------------------------------------------------------------------------------


def noisy_picture(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.frombytes("RGB", size, random.Random(0).randbytes(3 * math.prod(size))).save(path, compress_level=1)


def test_ten_thousand_lines_and_noisy_pictures_of_two_runs_are_a_light_page() -> None:
    chance, names = random.Random(0), [f"number_{index}" for index in range(12)]
    told = [json.dumps({"step": k, **dict.fromkeys(names, round(1 + chance.random(), 5))}) for k in range(1, 10_001)]
    told[5000] = json.dumps({"step": 5001, **dict.fromkeys(names, 50.0)})
    noisy_picture(Path("noise.png"), (300, 300))
    for name in ("a", "b"):
        run = make_run(name)
        (run / "metrics.jsonl").write_text("\n".join(told) + "\n")
        (run / "panels").mkdir()
        for path in (*(f"samples/{step:08d}.png" for step in range(10, 80, 10)), "panels/00000070.png"):
            (run / path).hardlink_to("noise.png")
    page = page_of("a b", "report.html")
    assert len(page) < 3.5e6  # pictures take 3.2 MB at most, a picture of two curves 13 kB
    assert page.count("<svg") == len(names)
    assert shown(page) + shown(page, "jpeg") == 2 * 7
    assert page.count(">to 50<") == len(names)  # the spike


def test_pictures_are_evenly_spaced_and_few_bytes() -> None:
    paths = [Path(f"{step:08d}.png") for step in range(101)]
    assert [int(path.stem) for path in evenly(paths, 6)] == [0, 20, 40, 60, 80, 100]
    assert evenly(paths[:3], 6) == paths[:3]
    assert evenly(paths, 1) == paths[-1:]
    assert evenly([], 6) == []
    noisy_picture(Path("noise.png"), (900, 450))
    for budget in (PICTURE_BYTES, 50_000, 2_000):
        assert len(shrunk(Path("noise.png"), (400, 400), budget)) <= budget
    Image.new("L", (1000, 10), 77).save("grey.png")
    Path("small.png").write_bytes(shrunk(Path("grey.png"), (100, 100), 10_000))
    with Image.open("small.png") as small:
        assert (small.size, small.mode, small.getextrema()) == ((100, 1), "L", (77, 77))


@needs_chromium
def test_a_browser_shows_it_on_a_telephone_and_in_the_dark_without_a_word_of_complaint() -> None:
    runs = [make_run(f"{'a-very-long-name-' * 6}{index}", skipped_student=float(index)) for index in range(3)]
    for run in runs:
        judge(run, fid=[3.0, 1.0, 2.0], prompt_accuracy=[0.1, 0.2, 0.3])
        draw(run, 100, (1200, 300))
        draw(run, 100, (2500, 300), "panels")
    page_of(" ".join(map(str, runs)), "report.html")
    check_page(Path("report.html").resolve())
