"""Runs can be stopped, killed and resumed, and the result is the same bit for bit."""

import copy
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fewstep.commands.distill import distill
from fewstep.commands.teach import teach
from fewstep.errors import Interrupted, UserError
from fewstep.files import folder_lock
from fewstep.models.loading.pretrained import load, open_model
from fewstep.models.pixel_model import PixelModel
from fewstep.recipes.loading import load_recipe
from fewstep.recipes.schema import DistillRecipe, TeachRecipe
from fewstep.runtime import writing
from fewstep.runtime.checkpoint import checkpoints
from fewstep.runtime.manifest import write_manifest
from fewstep.runtime.tracking import Allowance, read_metrics
from fewstep.training.loop import train
from fewstep.training.method import Method
from fewstep.training.settings import EvaluationSettings, LoopSettings
from steps import SHORT, SMALL, as_before, curves, flat, interrupt_at, last_state, make_dmd2, quiet, same, write_state

NO_GAN = {"student_weight": 0, "critic_weight": 0}
TINY = [*SHORT, "log_every=2", "checkpoint_every=4"]
MAIN_MEMORY = "parallel.offload_student_optimizer=true"
LORA = ["lora={rank: 4, alpha: 4}", "precision=bfloat16"]


def teach_recipe(*overrides: str) -> TeachRecipe:
    return load_recipe("digits-teacher", [*TINY, *SMALL, *overrides])


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "teacher"
    teach(teach_recipe(), run, report=quiet)
    return run


@pytest.fixture(scope="module")
def student_run(teacher_run: Path) -> Path:
    """Uninterrupted."""
    distill(distill_recipe(teacher_run), teacher_run.parent / "student", report=quiet)
    return teacher_run.parent / "student"


def distill_recipe(teacher_run: Path, *overrides: str) -> DistillRecipe:
    return load_recipe("digits-4step", [*TINY, "student_every=3", f"teacher={teacher_run}", *overrides])


def assert_same_end(first: Path, second: Path) -> None:
    """Same metrics to the letter, same weights, averages and optimizer states bit for bit."""
    assert curves(first) == curves(second)
    ours, theirs = last_state(first), last_state(second)
    assert len(flat(ours)) > 100
    assert same(ours, theirs)
    assert same(open_model(first).denoiser, open_model(second).denoiser)


@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        (4, []),
        pytest.param(7, [], marks=pytest.mark.slow),
        (7, ["precision=bfloat16"]),
        pytest.param(
            5,
            ["precision=bfloat16", "accumulate=2", "checkpointing=blocks", "gan.student_weight=3e-3"],
            marks=pytest.mark.slow,
        ),
        (5, [*LORA, "student.ema_decay=[0.9, 0]", "accumulate=2", "checkpointing=blocks", MAIN_MEMORY]),
        (4, ["critic.samples=cycle", "gan.real_share=0.5", "checkpointing=gan"]),
        (5, None),
    ],
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    teacher_run: Path, student_run: Path, tmp_path: Path, stop: int, settings: list[str] | None
) -> None:
    """Of a distillation; without settings of a teacher."""
    verb, recipe, whole = distill, distill_recipe(teacher_run, *(settings or [])), student_run
    if settings is None:
        verb, recipe, whole = teach, teach_recipe(), teacher_run
    elif settings:
        whole = tmp_path / "whole"
        distill(recipe, whole, report=quiet)
    with pytest.raises(Interrupted, match=f"stopped at step {stop + 1} of 12"):
        verb(recipe, tmp_path / "stopped", report=interrupt_at(stop))
    verb(recipe, tmp_path / "stopped", resume=True, report=quiet)
    assert_same_end(whole, tmp_path / "stopped")


def test_a_run_of_an_earlier_version_goes_on_to_the_same_end(
    teacher_run: Path, student_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        distill(distill_recipe(teacher_run), tmp_path / "stopped", report=interrupt_at(7))
    list(map(as_before, checkpoints(tmp_path / "stopped")))
    distill(distill_recipe(teacher_run), tmp_path / "stopped", resume=True, report=quiet)
    assert_same_end(student_run, tmp_path / "stopped")
    assert [sorted(os.listdir(path)) for path in checkpoints(tmp_path / "stopped")] == [
        ["manifest.json", "model", "state.pt"],
        ["manifest.json", "model", "state"],
    ]


def test_a_run_killed_while_writing_loses_only_the_steps_since_the_last_checkpoint(
    teacher_run: Path, student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, write, calls = distill_recipe(teacher_run), writing.write_shard, []

    def torn_write(shard: Path, step: int, slices: Any) -> None:
        write(shard, step, slices)
        calls.append(step)
        if len(calls) == 2:  # the second checkpoint: half a file is on the disk when the process dies
            os.truncate(shard, shard.stat().st_size // 2)
            raise SystemExit("killed")

    monkeypatch.setattr(writing, "write_shard", torn_write)
    with pytest.raises(SystemExit):
        distill(recipe, tmp_path / "killed", report=quiet)
    assert [path.name for path in checkpoints(tmp_path / "killed")] == ["00000004"]
    steps: list[int] = []
    distill(recipe, tmp_path / "killed", resume=True, report=lambda step, metrics: steps.append(step))
    assert steps == list(range(5, 13))
    assert_same_end(student_run, tmp_path / "killed")


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_it_to_the_same_end(
    teacher_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(teacher_run, tmp_path / "run")
    state = checkpoints(run)[-1] / "state" / "shard-00000.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    steps: list[int] = []
    teach(teach_recipe(), run, resume=True, report=lambda step, metrics: steps.append(step))
    assert steps == [9, 10, 11, 12]
    assert "00000012: state/shard-00000.safetensors has other bytes than were written" in capsys.readouterr().err
    assert_same_end(teacher_run, run)


def test_a_finished_run_resumes_to_nothing(teacher_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in teacher_run.rglob("*") if path.parent.name == "state"}
    assert len(before) == 4
    steps: list[int] = []
    teach(teach_recipe(), teacher_run, resume=True, report=lambda step, metrics: steps.append(step))
    assert steps == []
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_50_kills_at_any_moment_change_nothing(
    teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kill -9` while it starts, trains, writes or removes a checkpoint, and resumed each time."""
    recipe, run = distill_recipe(teacher_run, "num_steps=240", "checkpoint_every=1", "sample_every=7"), tmp_path / "run"
    context, draws, torn = multiprocessing.get_context("forkserver"), random.Random(0), 0
    context.set_forkserver_preload(["fewstep.commands.distill"])  # torch is imported once
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # sums depend on it
    for number in range(50):
        child, before = context.Process(target=distill, args=(recipe, run, True)), checkpoints(run)
        child.start()
        while number % 5 and checkpoints(run) == before:
            assert child.is_alive()
        time.sleep(draws.uniform(0, 0.3))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        torn += bool(list((run / "checkpoints").glob(".*")))
    assert torn >= 10  # killed within a write
    assert 0 < len(checkpoints(run)) <= 3
    distill(recipe, run, resume=True, report=quiet)
    distill(recipe, tmp_path / "whole", report=quiet)
    assert_same_end(tmp_path / "whole", run)
    assert not list((run / "checkpoints").glob("*damaged*"))


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(teacher_run: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher_run, tmp_path / "run")
    with folder_lock(tmp_path / "run"):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        with pytest.raises(UserError, match=f"run: process {os.getpid()} writes there"):
            teach(teach_recipe(), tmp_path / "run", resume=True, report=quiet)
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_a_kill_before_the_recipe_is_written_leaves_what_resumes(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in (".lock", ".recipe.yaml.0.tmp"):
        (tmp_path / "run" / name).write_text("left by a kill")
    teach(teach_recipe("num_steps=1"), tmp_path / "run", resume=True, report=quiet)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["00000001"]


def test_metrics_are_means_over_the_steps_since_the_last_line(teacher_run: Path, tmp_path: Path) -> None:
    teach(teach_recipe("log_every=1"), tmp_path / "each", report=quiet)
    each, pairs = (
        [json.loads(line)["denoising_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "each", teacher_run)
    )
    assert pairs == pytest.approx([(a + b) / 2 for a, b in zip(each[::2], each[1::2], strict=True)], rel=1e-5)


def test_a_run_folder_holds_what_the_readme_says(teacher_run: Path, student_run: Path) -> None:
    names = {"recipe.yaml", "facts.json", "metrics.jsonl", "samples", "checkpoints"}
    assert {path.name for path in teacher_run.iterdir()} == names
    assert [path.name for path in checkpoints(teacher_run)] == ["00000008", "00000012"]
    assert [path.name for path in (teacher_run / "samples").iterdir()] == ["00000012.png"]
    assert {path.name for path in student_run.iterdir()} == names | {"panels"}
    assert [path.name for path in (student_run / "panels").iterdir()] == ["00000012.png"]


def test_a_checkpoint_of_something_else_is_refused(teacher_run: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher_run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "99 old").mkdir()  # a stray folder is no checkpoint
    newest = checkpoints(tmp_path / "run")[-1]
    assert newest.name == "00000012"
    shutil.rmtree(newest / "state")
    write_state(newest / "state", 12, {"weights": torch.zeros(3)})
    write_manifest(newest)
    with pytest.raises(UserError, match="00000012: the checkpoint is not of this run; remove it"):
        teach(teach_recipe(), tmp_path / "run", resume=True, report=quiet)


@pytest.mark.parametrize("images", [40, 4, 13])
def test_a_grid_has_as_many_images_as_the_recipe_says(teacher_run: Path, tmp_path: Path, images: int) -> None:
    distill(distill_recipe(teacher_run, f"grid_images={images}", "num_steps=1"), tmp_path / "run", report=quiet)
    columns, rows = min(10, images), -(-images // 10)
    with Image.open(tmp_path / "run" / "samples" / "00000001.png") as picture:
        assert picture.width == 68 * columns + 4
        assert rows * (64 + 10) < picture.height < rows * (64 + 25)  # each row above a line of classes


def test_a_grid_is_the_same_in_batches_of_any_size(teacher_run: Path, tmp_path: Path) -> None:
    """Noise and class of an image do not depend on the batch that it is drawn in."""
    grids = []
    for size in (40, 7):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PixelModel, "sampling_batch", size)
            distill(distill_recipe(teacher_run, "num_steps=1"), tmp_path / str(size), report=quiet)
        with Image.open(tmp_path / str(size) / "samples" / "00000001.png") as picture:
            grids.append(torch.tensor(list(picture.tobytes())))
    assert (grids[0] - grids[1]).abs().max() <= 1


# --- judging on the way ----------------------------------------------------------------------------------------------

SCORES = {3: 5.0, 6: 1.0, 9: 3.0, 12: 4.0}  # step -> FID; recall grows with the step, and so the last is best in it


@pytest.fixture(scope="module")
def judged(teacher_run: Path) -> Iterator[Callable[..., list[float]]]:
    """Distils with a judge that knows the FIDs beforehand; gives the sums of the weights that it was shown."""
    recipe = distill_recipe(teacher_run, "evaluation.every=3", "evaluation.time_share=1", "checkpoint_every=100")
    sums: list[float] = []

    def evaluate(method: Method, step: int) -> dict[str, float]:
        with method.averaged_model() as model:
            sums.append(sum(p.double().sum().item() for p in model.denoiser.parameters()))
        return {"fid": SCORES[step], "recall": step / 12}

    def run(folder: Path, report=quiet, resume: bool = False) -> list[float]:
        sums.clear()
        distill(recipe, folder, resume=resume, report=report)
        return list(sums)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.commands.distill.make_evaluation", lambda *args: evaluate)
        yield run


@pytest.fixture(scope="module")
def whole(judged: Callable, teacher_run: Path) -> tuple[Path, list[float], list[tuple[int, dict[str, float]]]]:
    """A judged run, what its judge was shown and what was reported."""
    run, shown = teacher_run.parent / "judged", []
    return run, judged(run, lambda *args: shown.append(args)), shown


def test_the_best_checkpoints_are_kept_beside_the_newest_two(whole: tuple) -> None:
    run, sums, shown = whole
    lines = [{"step": step, "fid": fid, "recall": step / 12} for step, fid in SCORES.items()]
    assert read_metrics(run / "evaluations.jsonl") == lines
    assert [int(path.name) for path in checkpoints(run)] == [6, 9, 12]
    assert [(step, metrics["fid"]) for step, metrics in shown if "fid" in metrics] == [*SCORES.items()]
    assert len(set(sums)) == 4
    saved = load(checkpoints(run)[0] / "model").denoiser  # what was judged is what was kept
    assert sums[1] == pytest.approx(sum(p.double().sum().item() for p in saved.parameters()), abs=1e-9)
    assert all("fid" not in line for line in read_metrics(run / "metrics.jsonl"))


@pytest.mark.parametrize("stop", [4, 5, 6, 8])
def test_a_judged_run_resumes_exactly(whole: tuple, judged: Callable, tmp_path: Path, stop: int) -> None:
    run, sums, _ = whole
    with pytest.raises(Interrupted, match=f"stopped at step {stop + 1} of 12"):
        judged(tmp_path, interrupt_at(stop))
    rest = judged(tmp_path, resume=True)
    assert rest == sums[-len(rest) :]
    assert_same_end(run, tmp_path)
    assert (run / "evaluations.jsonl").read_text() == (tmp_path / "evaluations.jsonl").read_text()
    assert (tmp_path / "checkpoints" / "00000006").is_dir()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time as the test has it."""
    now = [1000.0]
    monkeypatch.setattr("fewstep.runtime.tracking.time.perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "share", "judged"),
    [  # between them 1 s each
        (1, 1.0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (100, 1.0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (1, 0.5, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (1, 0.25, [1, 6, 9, 12]),  # at 6 + 1 s, for (1 + 1) / (6 + 1 + 1) is a quarter
        (4, 0.5, [1, 8, 12]),  # at 8 + 4 s, for (4 + 4) / (8 + 4 + 4) is a half
        (100, 0.05, [1]),
    ],
)
def test_what_comes_again_takes_no_more_than_its_share(
    clock: list[float], seconds: float, share: float, judged: list[int]
) -> None:
    allowance, found, began = Allowance(share), [], clock[0]
    for step in range(1, 13):
        clock[0] += 1
        if allowance.allows():
            with allowance.spending():
                clock[0] += seconds
            found.append(step)
            assert len(found) == 1 or seconds * len(found) <= share * (clock[0] - began)
    assert found == judged


def test_a_run_leaves_out_evaluations_that_exceed_their_share_and_judges_the_last_step_also_resumed(
    tiny_model: PixelModel, tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """A step takes 1 s, an evaluation 4; behind a stop it is counted anew. The best of those there were is kept."""
    costs = {1: 5.0, 8: 1.0, 9: 3.0, 12: 4.0}  # by step, and of no others
    settings = LoopSettings(
        num_steps=12, batch_size=2, checkpoint_every=100, evaluation={"every": 1, "time_share": 0.5}, grid_images=2
    )

    def evaluate(method: Method, step: int) -> dict[str, float]:
        clock[0] += 4
        return {"fid": costs[step]}

    def run(folder: Path, stop: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        method = make_dmd2(copy.deepcopy(tiny_model), 2, student={"num_timesteps": 1}, gan=NO_GAN)
        step_of = method.step

        def step(*given: Any, **named: Any) -> Any:
            clock[0] += 1
            return step_of(*given, **named)

        method.step = step
        train(method, lambda step, rows: {}, folder, settings, interrupt_at(stop), evaluate)

    run(tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped at step 8 of 12"):
        run(tmp_path / "stopped", 7)
    run(tmp_path / "stopped")
    for name, judged in (("whole", [1, 8, 12]), ("stopped", [1, 8, 9, 12])):
        lines = read_metrics(tmp_path / name / "evaluations.jsonl")
        assert [line["step"] for line in lines] == judged
        assert [int(path.name) for path in checkpoints(tmp_path / name)] == judged[1:]  # of which 8 is the best
    told = capsys.readouterr().err.splitlines()
    share = "not judged, for that would take more than evaluation.time_share=0.5 of the run's time"
    assert [line.partition(share)[::2] for line in told] == [
        (f"step {step}: ", ", here and further on; the last step is judged in any case") for step in (2, 2, 10)
    ]


def test_the_best_of_each_average_is_kept_by_the_metrics_that_are_named() -> None:
    asked = EvaluationSettings(keep=["fid", "grey"], scorers=["own:Grey"])
    names = ["fid", "ema0.99995_fid", "ema0.9_grey", "kid", "patch_fid", "ema0.9_patch_fid", "brightness"]
    assert [name for name in names if asked.keeps(name)] == names[:3]
    with pytest.raises(ValueError, match="keep: 'grey' is no metric; there are accuracy, brightness, "):
        EvaluationSettings(keep=["grey"])


def test_an_evaluation_without_its_checkpoint_is_made_again(whole: tuple, judged: Callable, tmp_path: Path) -> None:
    """Killed between the two: the line is dropped and written anew, once."""
    run = shutil.copytree(whole[0], tmp_path / "run")
    before = (run / "evaluations.jsonl").read_text()
    shutil.rmtree(run / "checkpoints" / "00000012")
    assert len(judged(run, resume=True)) == 1
    assert (run / "evaluations.jsonl").read_text() == before
