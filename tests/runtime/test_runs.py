"""Which checkpoint is meant: the newest, that of a step, the best by a metric."""

import json
import math
import shutil
from pathlib import Path

import pytest

from fewstep.errors import UserError
from fewstep.metric_table import METRICS, Metric
from fewstep.runtime.runs import Found, best_steps, find, run_folder, short_name

LINES = [
    {"step": 10, "fid": 3.0, "patch_fid": 9.0, "accuracy": 0.9, "recall": 0.1, "ema0.5_fid": 2.0},
    {"step": 20, "fid": 1.0, "patch_fid": 7.0, "accuracy": 0.8, "recall": 0.4},
    {"step": 30, "fid": 1.0, "patch_fid": 8.0, "accuracy": 0.95, "recall": 0.2},
]


def make_run(folder: Path, steps: tuple[int, ...], lines: list[dict]) -> Path:
    for step in steps:
        (folder / "checkpoints" / f"{step:08d}" / "model-ema0.5").mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text("kind: distill\n")
    (folder / "evaluations.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", (10, 20, 30, 40), LINES)


def test_less_is_better_for_distances_and_more_for_the_rest_and_the_first_of_equals_wins() -> None:
    assert best_steps(LINES) == {"fid": 20, "patch_fid": 20, "accuracy": 30, "recall": 20, "ema0.5_fid": 10}
    assert best_steps([]) == {}


def test_what_is_better_is_the_tables_word_and_what_is_no_number_is_never_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METRICS, "kid", Metric("kid", "lower"))
    lines = [{"kid": 0.3, "fid": math.nan}, {"kid": 0.1, "fid": 2.0}, {"kid": math.nan}]
    assert best_steps({"step": step, **line} for step, line in enumerate(lines, 1)) == {"kid": 2, "fid": 2}


@pytest.mark.parametrize(
    ("choice", "step"),
    [("", 40), ("@10", 10), ("@40", 40), ("@best-fid", 20), ("@best-accuracy", 30), ("@best-recall", 20)],
)
def test_a_checkpoint_is_found(run: Path, choice: str, step: int) -> None:
    found = find(f"{run}{choice}")
    assert found == Found(run, step, None)
    assert found.folder == found.checkpoint / "model" == run / "checkpoints" / f"{step:08d}" / "model"
    assert run_folder(f"{run}{choice}") == run
    assert short_name(f"{run}{choice}") == f"run{choice}"
    assert short_name(found.folder) == f"run@{step}"


def test_an_average_is_found_by_name_or_by_the_metric_that_judged_it(run: Path) -> None:
    assert find(f"{run}@20", "0.5") == Found(run, 20, "0.5")
    assert find(f"{run}@best-ema0.5_fid") == Found(run, 10, "0.5")
    assert find(f"{run}@20", "0.5").folder == run / "checkpoints" / "00000020" / "model-ema0.5"
    assert find(run).averages == [Found(run, 40), Found(run, 40, "0.5")]
    with pytest.raises(UserError, match=r"00000040: has no average '0\.9' beside its first, .*; it has 0\.5$"):
        find(run, "0.9")


def test_the_best_is_the_best_of_those_that_are_there_and_that_another_was_better_is_told_once(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.rmtree(run / "checkpoints" / "00000020")
    assert [find(f"{run}@best-{name}").step for name in ("fid", "recall", "recall", "accuracy", "ema0.5_fid")] == [
        *(30, 30, 30),
        *(30, 10),
    ]
    find(run), find(f"{run}@30")
    told = "step 20 was the best, but was not kept (evaluation.keep); 30 is taken"
    assert capsys.readouterr().err.splitlines() == [f"fewstep: {run}: by {name} {told}" for name in ("fid", "recall")]


def test_a_run_whose_name_holds_the_sign_is_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run@home", (10, 20), [])
    assert find(run).step == 20
    assert find(f"{run}@10").step == 10


@pytest.mark.parametrize("choice", ["15", "best-kid", "best", "newest", "0x10"])
def test_what_is_not_there_is_told_with_what_is(run: Path, choice: str) -> None:
    with pytest.raises(UserError) as refused:
        find(f"{run}@{choice}")
    wanted = "@10, @20, @30, @40, @best-accuracy, @best-ema0.5_fid, @best-fid, @best-patch_fid, @best-recall"
    assert str(refused.value) == f"{run}: has no checkpoint @{choice}; it has {wanted}"


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("none@best-fid", "none: no such run folder; name one that"),
        ("", r"not a run folder \(it has no recipe\.yaml\); name one that"),
        ("new", "new: the run has no checkpoint yet"),
        ("plain@best-fid", "it has @10, and was not evaluated as it ran"),
    ],
)
def test_what_is_no_run_or_has_nothing_yet_is_told(tmp_path: Path, place: str, told: str) -> None:
    make_run(tmp_path / "new", (), [])
    make_run(tmp_path / "plain", (10,), [])
    with pytest.raises(UserError, match=told):
        find(f"{tmp_path}/{place}")
