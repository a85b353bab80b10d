"""A recipe makes what it builds on: one command runs teacher, pairs, start and student."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import Run, fewstep, refused
from fewstep.commands import demo, drawing
from fewstep.files import folder_lock
from fewstep.recipes import loading
from fewstep.recipes.loading import read_run_recipe
from fewstep.runtime.checkpoint import checkpoint_steps
from fewstep.training.regression import Regression
from steps import curves, dying, last_state, same, spy

FEW = {"num_steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "grid_images": 2, "device": "cpu"}
OF_TEACHER = {"kind": "distill", "teacher": "digits-teacher", "data": {"source": "digits"}, **FEW}
PAIRS = {"pairs": "digits-pairs", "sampler": "heun:2", "num": 6}
RECIPES: dict[str, dict[str, Any]] = {
    "digits-teacher": {
        "kind": "teach",
        "model": {"num_classes": 10, "block_out_channels": [8, 8], "norm_num_groups": 4},
    }
    | {**FEW, "num_steps": 2},
    "digits-1step-init": {**OF_TEACHER, "kind": "regress", "regression": PAIRS},
    "digits-1step": {**OF_TEACHER, "init_from": "digits-1step-init", "student_every": 2},
    "digits-4step": {**OF_TEACHER, "student": {"num_timesteps": 4}},
    "digits-dmd": {**OF_TEACHER, "regression_weight": 0.25, "regression": PAIRS},
}
STUDENT, START, TEACHER = (Path("runs", name) for name in ("digits-1step", "digits-1step-init", "digits-teacher"))
DRAWN = Path("runs/digits-pairs")
MADE = [DRAWN, START, TEACHER]


@pytest.fixture(scope="module", autouse=True)
def _shipped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Recipes of those names come with fewstep, and are small."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"description": name, **recipe}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "FOLDER", folder)
        patch.setattr("fewstep.data.pairs.FILE_BYTES", 2 * 256)  # 2 pairs a file
        patch.setattr("fewstep.models.image_model.NUMBERS_PER_BATCH", 2 * 64)
        yield


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one command has run."""
    folder = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, output, errors = fewstep("distill digits-1step", whole=True)
        assert code == 0, errors
        assert output.count("wrote ") == 1  # of what was asked for
    return folder


def files(*folders: Path) -> dict[Path, int]:
    """When each was written."""
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def start_over(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder)


# --- what is made ----------------------------------------------------------------------------------------------------


def test_one_command_makes_teacher_pairs_start_and_student(run: Run) -> None:
    assert sorted(path.name for path in Path("runs").iterdir()) == sorted(path.name for path in [STUDENT, *MADE])
    assert len(list(DRAWN.glob("*.parquet"))) == 3
    assert [checkpoint_steps(each)[-1] for each in (TEACHER, START, STUDENT)] == [2, 4, 4]
    by_hand = "data pairs --teacher runs/digits-teacher --num 6 --sampler heun:2 --batch-size 2 --out by-hand"
    assert run(by_hand)[0] == 0
    for path in Path("by-hand").iterdir():
        assert path.read_bytes() == (DRAWN / path.name).read_bytes()
    told = "--set teacher=runs/digits-teacher --set init_from"
    assert run(f"distill digits-1step --out told/student {told}={START}")[0] == 0
    assert same(last_state(STUDENT)["method"], last_state(Path("told/student"))["method"])
    assert run(f"distill digits-1step --out told/without {told}=null")[0] == 0
    assert not same(last_state(STUDENT)["method"], last_state(Path("told/without"))["method"])


def test_what_is_there_is_not_made_anew(run: Run) -> None:
    before = files(*MADE)
    assert run("distill digits-1step --resume")[0] == 0
    assert run("distill digits-1step --out runs/second")[0] == 0
    assert run("distill digits-dmd")[0] == 0
    assert files(*MADE) == before
    assert "regression_loss" in curves(Path("runs/digits-dmd"))[0]
    assert same(last_state(STUDENT)["method"], last_state(Path("runs/second"))["method"])


def test_a_start_is_made_with_the_teacher_and_the_device_of_its_student(run: Run) -> None:
    assert run("distill digits-1step --out others/student --set teacher=runs/digits-teacher")[0] == 0
    made = read_run_recipe(Path("others/digits-1step-init/recipe.yaml"))
    assert (made.teacher, made.regression.pairs, made.device) == ("runs/digits-teacher", "digits-pairs", "cpu")
    assert sorted(path.name for path in Path("others").iterdir()) == ["digits-1step-init", "digits-pairs", "student"]
    assert same(last_state(STUDENT)["method"], last_state(Path("others/student"))["method"])


def test_pairs_of_that_name_here_go_before_those_beside_the_run(run: Run) -> None:
    DRAWN.rename("digits-pairs")
    before = files(Path("digits-pairs"))
    assert run("distill digits-dmd")[0] == 0
    assert not DRAWN.exists()
    assert files(Path("digits-pairs")) == before


# --- going on --------------------------------------------------------------------------------------------------------

MAKING = "fewstep: stopped while making digits-1step-init; the same command goes on with it\n"


def test_a_stop_while_pairs_are_drawn_keeps_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = last_state(STUDENT)["method"]
    start_over(STUDENT, START, DRAWN)
    with monkeypatch.context() as patch:
        spy(patch, drawing, "sample", dying(2, KeyboardInterrupt()))
        assert run("distill digits-1step")[::2] == (130, MAKING)
    before = files(DRAWN)
    assert sorted(path.name for path in before) == ["00000.parquet", "00001.parquet", "pairs.json"]
    assert not START.exists()
    assert not STUDENT.exists()
    assert run("distill digits-1step")[0] == 0
    assert before.items() <= files(DRAWN).items()
    assert same(whole, last_state(STUDENT)["method"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_within_the_start_leaves_a_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    whole = last_state(STUDENT)["method"]
    start_over(STUDENT, START)
    with monkeypatch.context() as patch:
        calls = iter(range(9))
        spy(patch, Regression, "step", lambda *_, **named: os.kill(os.getpid(), number) if next(calls) == 2 else None)
        assert run("distill digits-1step")[::2] == (128 + number, MAKING)
    assert checkpoint_steps(START)[-1] == 3
    assert not STUDENT.exists()
    assert run("distill digits-1step")[0] == 0
    assert checkpoint_steps(START)[-1] == 4
    assert same(whole, last_state(STUDENT)["method"])


def test_a_start_that_is_here_alone_goes_on_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --out here, where the name of the recipe is that of its run's folder."""
    whole = last_state(STUDENT)["method"]
    for each in MADE:
        each.rename(each.name)
    shutil.rmtree(Path(START.name, "checkpoints", "00000004"))
    assert run("distill digits-1step --out student")[0] == 0
    assert checkpoint_steps(Path(START.name))[-1] == 4
    assert same(whole, last_state(Path("student"))["method"])


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("digits-1step-init --set regression.num=7", "digits-pairs: pairs of another number (6) than asked for (7)"),
        ("digits-1step-init --set regression.sampler=heun:3", "pairs of another sampler (heun:2) than asked for"),
        (
            "digits-1step-init --set regression.pairs=new --set regression.sampler=lcm:2",
            "regression.sampler lcm:2: adds",
        ),
        (
            "digits-1step --set init_from=digits-1step",
            "init_from: goes round in a circle (digits-1step -> digits-1step)",
        ),
        ("digits-1step --set init_from=digits-4step@2", "digits-4step: no such run; `fewstep distill digits-4step`"),
        ("digits-1step --set init_from=digits-teacher", "init_from: digits-teacher makes no student"),
    ],
)
def test_what_can_not_be_made_is_told_in_one_line(run: Run, line: str, told: str) -> None:
    start_over(STUDENT, START)
    before = files(Path())
    refused(run(f"distill {line}"), told)
    assert files(Path()) == before


def test_a_longer_circle_and_a_start_that_another_makes_are_told(run: Run) -> None:
    start_over(STUDENT, START)
    around = run("distill digits-1step --set init_from=digits-1step --out runs/digits-1step-init")
    refused(around, "circle (digits-1step-init -> digits-1step -> digits-1step-init)")
    with folder_lock(START):
        refused(run("distill digits-1step"), f"init_from: digits-1step-init: {START}: process", "writes there")


def test_a_start_of_another_teacher_is_refused_unless_the_user_names_it(run: Run) -> None:
    assert run("teach digits-teacher --set seed=1 --out runs/other")[0] == 0
    line = "distill digits-1step --out runs/second --set teacher=runs/other"
    refused(run(line), f"init_from: {START} is a student of another teacher", "--set init_from=digits-1step-init")
    assert run(f"{line} --set init_from=digits-1step-init")[0] == 0


# --- within the demo -------------------------------------------------------------------------------------------------


def test_a_demo_makes_pairs_and_start_in_the_task_of_the_first_student(
    run: Run, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, job = Path("runs"), demo.DIGITS
    whole = last_state(STUDENT)["method"]
    start_over(STUDENT, START, DRAWN)
    recipes = demo.demo_recipes(job, out, ["seed=0", "regression.num=6"])
    assert list(recipes) == ["digits-teacher", "digits-1step-init", "digits-1step", "digits-4step"]
    assert recipes["digits-1step"].init_from == str(START)
    tasks = [demo.training(out, name, recipes) for name in job.students[0]]
    assert [task.total for task in tasks] == [6 + 4 + 4, 4]

    def stopping(done: int, metrics: dict[str, float]) -> None:
        if done == 8:  # within the start
            raise demo.Interrupted("stopped")

    with pytest.raises(demo.Interrupted):
        tasks[0].function(*tasks[0].arguments, stopping)
    assert checkpoint_steps(START)[-1] == 3  # the one behind
    told: list[int] = []
    tasks[0].function(*tasks[0].arguments, lambda done, metrics: told.append(done))
    assert (told[0], told[-1], told) == (10, 14, sorted(told))
    assert capsys.readouterr() == ("", "")
    assert same(whole, last_state(STUDENT)["method"])


def test_a_start_can_be_left_out_of_the_demo_and_others_are_not_its_matter(run: Run) -> None:
    recipes = demo.demo_recipes(demo.DIGITS, Path("runs"), ["init_from=null"])
    assert list(recipes) == ["digits-teacher", "digits-1step", "digits-4step"]
    assert recipes["digits-1step"].init_from is None
    assert demo.training(Path("runs"), "digits-1step", recipes).total == 4
