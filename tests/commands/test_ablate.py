"""`fewstep ablate`: what is run and what is not, what is told of runs that fail, and how a study goes on."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import fewstep.commands.ablate as module
from apart import Here
from command_line import fewstep, refused
from fewstep.errors import Interrupted
from fewstep.evaluation import extractors
from fewstep.runtime.tracking import Report
from steps import apart, curves, last_state, same

SMALL = {
    "num_steps": 2,
    "batch_size": 4,
    "grid_images": 2,
    "model": {"block_out_channels": [8, 8], "norm_num_groups": 4},
}
PAIRS, TWO_STEPS = {"pairs": "digits-pairs", "sampler": "heun:2"}, {"num_timesteps": 2, "timesteps": [80, 1]}
STUDY: dict[str, Any] = {
    "description": "a small one",
    "prepare": [
        {"run": "digits-teacher", "set": SMALL},
        {"pairs": "digits-pairs", "teacher": "digits-teacher", "num": 6, "sampler": "heun:2"},
    ],
    "teacher": "digits-teacher",
    "samplers": ["ddim:2"],
    "seeds": [0, 1],
    "num_samples": 100,
    "recipe": "digits-1step",
    "set": {
        "init_from": None,
        "num_steps": 4,
        "batch_size": 4,
        "student_every": 2,
        "log_every": 1,
        "checkpoint_every": 2,
        "grid_images": 2,
    },
    "rows": [
        {"name": "pairs", "set": {"regression_weight": 0.25, "regression": PAIRS}},
        {"name": "two steps", "recipe": "digits-4step", "set": {"student": TWO_STEPS}},
    ],
}
RUNS = {"pairs": "digits-1step", "two steps": "digits-4step"}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setattr(extractors, "train_classifier", partial(extractors.train_classifier, num_steps=5))
    monkeypatch.setattr(module, "run_apart", found := Here())
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place where the study was run once."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(extractors, "train_classifier", partial(extractors.train_classifier, num_steps=5))
        patch.setattr(module, "run_apart", Here())
        Path("mine.yaml").write_text(yaml.safe_dump(STUDY))
        code, output, errors = fewstep("ablate mine.yaml --out out")
        assert (code, output.count("wrote ")) == (0, 1), errors
        yield folder


@pytest.fixture
def place(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where the test is."""
    shutil.copytree(done, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def results(name: str = "mine") -> dict[str, Any]:
    return json.loads(Path("out", name, "results.json").read_text())


def run_of(row: str, seed: int) -> Path:
    (found,) = (each for each in results()["rows"] if each["name"] == row)
    return Path("out", found["runs"][seed]["folder"])


def test_a_study_runs_every_row_with_every_seed_and_tells_all_numbers(place: Path) -> None:
    names = {path.name for path in Path("out").iterdir()}
    found = results()
    assert [row["name"] for row in found["rows"]] == ["real images", "digits-teacher, ddim 2", *RUNS]
    for row in found["rows"][2:]:
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert {run["folder"] for run in row["runs"]} < names
        assert row["recipe"] == RUNS[row["name"]]
        assert all(run["version"] == found["version"] and run["seconds"] > 0 for run in row["runs"])
        assert len({run["values"]["fid"] for run in row["runs"]}) == 2
    recipe = yaml.safe_load((run_of("pairs", 1) / "recipe.yaml").read_text())
    assert (recipe["seed"], recipe["teacher"]) == (1, "out/digits-teacher")
    assert recipe["regression"]["pairs"] == "out/digits-pairs"
    assert "student.num_timesteps: 1 -> 2" in found["rows"][3]["differences"]
    assert found["rows"][2]["settings"]["regression"] == PAIRS
    table = Path("out/mine/table.md").read_text()
    assert table.startswith("# mine\n\na small one\n\n100 images a run; mean ± standard deviation over seeds 0, 1.\n")
    assert Path("out/mine/plot.png").stat().st_size > 1000


def test_runs_are_judged_as_evaluate_judges_them(place: Path) -> None:
    run, pairs = run_of("two steps", 0), run_of("pairs", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.commands.evaluate.images_per_second", lambda *args: 1.0)
        line = f"evaluate out/digits-teacher {run} {pairs} --stops --sampler ddim:2 --num-samples 100"
        assert fewstep(f"{line} --out judged")[0] == 0
    theirs = {row["model"]: row for row in json.loads(Path("judged/results.json").read_text())}
    rows = {row["name"]: row for row in results()["rows"]}

    def alike(ours: dict[str, float], model: str) -> bool:
        return ours == pytest.approx({name: theirs[model][name] for name in ours}, rel=1e-6, abs=1e-9)

    assert alike(rows["real images"]["mean"], "real")
    assert alike(rows["digits-teacher, ddim 2"]["mean"], "digits-teacher")
    assert alike(rows["pairs"]["runs"][1]["values"], pairs.name)
    first, last = rows["two steps"]["runs"][0]["stops"]
    assert alike(last, run.name)
    assert alike(first, f"{run.name}, stop 1 of 2")
    assert last == rows["two steps"]["runs"][0]["values"]


def test_what_is_there_is_neither_run_nor_judged_again(place: Path, here: Here) -> None:
    before = results()
    assert fewstep("ablate mine.yaml --out out")[0] == 0
    assert here.ran == []
    assert results() == before
    assert fewstep("ablate mine.yaml --out out --seeds 1,2 --num-samples 110")[0] == 0
    # Only seed 2 is trained; that more images are judged needs no training.
    assert [each for each in here.ran if each in RUNS] == [*RUNS, *RUNS]
    assert run_of("pairs", 0).name == before["rows"][2]["runs"][1]["folder"]
    assert results()["num_samples"] == 110


def test_another_study_shares_runs_and_a_changed_setting_makes_new_ones(place: Path, here: Here) -> None:
    rows = [STUDY["rows"][0], {"name": "more", "set": {"student_every": 1}}]
    Path("other.yaml").write_text(yaml.safe_dump({**STUDY, "seeds": [1], "rows": rows}))
    assert fewstep("ablate other.yaml --out out")[0] == 0
    assert here.ran == ["more"]
    assert results("other")["rows"][2]["runs"][0] == results()["rows"][2]["runs"][1]


def test_a_run_made_by_hand_is_the_same_run(place: Path, here: Here) -> None:
    run, told = run_of("two steps", 0), results()
    shutil.rmtree(run)
    settings = {"student.num_timesteps": 2, "student.timesteps": "[80,1]", "num_steps": 4, "batch_size": 4}
    settings |= {
        "student_every": 2,
        "log_every": 1,
        "checkpoint_every": 2,
        "grid_images": 2,
        "teacher": "out/digits-teacher",
    }
    sets = " ".join(f"--set {key}={value}" for key, value in settings.items())
    assert fewstep(f"distill digits-4step --out {run} {sets}")[0] == 0
    assert fewstep("ablate mine.yaml --out out")[0] == 0
    assert here.ran == ["two steps"]  # judged
    values = [each["rows"][3]["runs"][0]["values"] for each in (told, results())]
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--ranks 3", "study mine: digits-teacher: 3 ranks don't divide batch_size 4; take 3, or fewer ranks"),
        ("--ranks none", "--ranks"),
    ],
)
def test_ranks_that_no_run_takes_are_told_before_anything_runs(place: Path, here: Here, more: str, told: str) -> None:
    refused(fewstep(f"ablate mine.yaml --out new {more}"), told)
    assert here.ran == []
    assert not Path("new").exists()


def test_runs_have_ranks_and_what_judges_has_none(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[int, int]] = {}

    def note(tasks: Any, jobs: int, ended: Any = None) -> list[Any]:
        seen.update({task.title: (task.ranks, jobs) for task in tasks})
        return [None] * len(tasks)

    monkeypatch.setattr(module, "run_apart", note)
    monkeypatch.setattr(module, "num_cores", lambda: 5)
    monkeypatch.setattr(module.Work, "first_model", lambda self: None)
    for path in Path("out").glob("digits-*"):
        shutil.rmtree(path)
    assert fewstep("ablate mine.yaml --out out --ranks 2")[0] == 2  # for there are no runs
    first = {"digits-teacher": (2, 1), "digits-pairs": (2, 1)}
    assert seen == {**first, "judge digits-teacher": (1, 2), "pairs": (2, 2), "two steps": (2, 2)}


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "state.pt")


def test_a_run_that_fails_leaves_the_others_alone(place: Path, here: Here) -> None:
    before, lost, reason = results(), run_of("pairs", 0), "state.pt: No space left on device"
    for row in RUNS:
        shutil.rmtree(run_of(row, 0))
    here.first["pairs"] = no_space
    code, output, errors = fewstep("ablate mine.yaml --out out")
    assert code == 2
    assert here.ran == list(RUNS)
    assert f"pairs, seed 0 ({lost.name}): {reason}\n" in output
    last = "fewstep: 1 of its runs are missing, as out/mine/table.md tells; the same command tries again\n"
    assert errors.endswith(last)
    assert Path("out/mine/table.md").read_text().endswith(f"- pairs, seed 0 ({lost.name}): {reason}\n")
    assert [len(row["runs"]) for row in results()["rows"]] == [1, 1, 2, 2]
    assert fewstep("ablate mine.yaml --out out")[0] == 0
    assert here.ran == [*RUNS, "pairs"]
    for ours, theirs in zip(results()["rows"], before["rows"], strict=True):
        assert ours["mean"] == pytest.approx(theirs["mean"])


def test_an_interrupted_run_goes_on_to_the_same_numbers(
    place: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before = run_of("two steps", 1), results()
    state, lines = last_state(run), curves(run)
    shutil.rmtree(run)
    whole = module.train_recipe

    def stopping(jobs: Any, recipe: Any, run: Path, resume: bool, report: Report) -> Any:
        def stop(step: int, metrics: dict[str, float]) -> None:
            if step == 1:
                signal.raise_signal(signal.SIGTERM)

        return whole(jobs, recipe, run, resume, stop)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_recipe", stopping)
        code, output, _ = fewstep("ablate mine.yaml --out out")
    assert code == 2
    assert f"({run.name}): stopped at step 2 of 4" in output
    assert fewstep("ablate mine.yaml --out out")[0] == 0
    assert same(last_state(run)["method"], state["method"])
    assert curves(run) == lines
    assert results()["rows"][3]["mean"] == before["rows"][3]["mean"]


def test_ctrl_c_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(run_of("pairs", 0))

    def stopped(*args: object) -> None:
        raise Interrupted("stopped", signal.SIGTERM)

    monkeypatch.setattr(module, "run_apart", stopped)
    assert fewstep("ablate mine.yaml --out out") == (143, "", "fewstep: stopped; the same command goes on with out\n")


def test_a_failed_preparation_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Here) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(STUDY))
    here.first["digits-teacher"] = no_space
    told = "fewstep: out/digits-teacher: state.pt: No space left on device; the same command goes on\n"
    code, _, errors = fewstep("ablate mine.yaml --out out")
    assert (code, errors) == (2, told)
    assert not Path("out/mine").exists()


# --- what lies in OUT and is something else --------------------------------------------------------------------------


def of_another_version(run: Path) -> None:
    facts = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps({**facts, "version": "0.0.9"}))


def of_another_recipe(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "batch_size": 5}))


def no_run(run: Path) -> None:
    (run / "recipe.yaml").unlink()


def other_pairs(run: Path) -> None:
    plan = json.loads(Path("out/digits-pairs/pairs.json").read_text())
    Path("out/digits-pairs/pairs.json").write_text(json.dumps({**plan, "sampler": "heun:3"}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (of_another_version, ": was made by fewstep 0.0.9, and this is 0.1.0, whose numbers may be others; choose ano"),
        (of_another_recipe, ": has another recipe (batch_size: 5 -> 4); choose another --out, or remove it"),
        (no_run, "not a run folder (it has no recipe.yaml)"),
        (other_pairs, "out/digits-pairs: has 6 pairs by heun:3, and the study wants 6 pairs by heun:2; choose another"),
    ],
)
def test_what_is_not_the_studys_is_told_before_anything_runs(place: Path, here: Here, damage: Any, told: str) -> None:
    run = run_of("pairs", 0)
    damage(run)
    refused(fewstep("ablate mine.yaml --out out --seeds 0,1,2"), told)
    assert here.ran == []


def test_a_teacher_of_another_recipe_is_told(place: Path, here: Here) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump({**STUDY, "prepare": [{"run": "digits-teacher"}, STUDY["prepare"][1]]}))
    refused(fewstep("ablate mine.yaml --out out"), "out/digits-teacher: has another recipe (", "num_steps: 2 -> 1000")


def test_runs_of_before_versions_were_kept_are_taken(place: Path, here: Here) -> None:
    run = run_of("pairs", 0)
    (run / "facts.json").unlink()
    assert fewstep("ablate mine.yaml --out out")[0] == 0
    assert results()["rows"][2]["runs"][0]["version"] is None


@pytest.mark.slow
def test_a_study_of_text_to_image_prepares_latents_and_the_run_that_students_start_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Here
) -> None:
    monkeypatch.chdir(tmp_path)
    short = {"num_steps": 2, "batch_size": 4, "grid_images": 2}
    model = {"model": {"block_out_channels": [16, 32]}}
    data = {"data": {"source": "latents"}}
    prepare = [
        {"run": "shapes-autoencoder", "set": short},
        {"latents": "latents", "autoencoder": "shapes-autoencoder", "num": 64},
        {"run": "shapes-teacher", "set": {**short, **model, **data}},
        {"run": "shapes-1step", "set": {**short, **data}},
    ]
    rows = [{"name": "four"}, {"name": "without", "set": {"student.backward_simulation": False}}]
    text = {
        "teacher": "shapes-teacher",
        "samplers": ["ddim:2@1.5"],
        "seeds": [3],
        "num_samples": 100,
        "set": {**short, **data},
    }
    Path("text.yaml").write_text(yaml.safe_dump({**text, "prepare": prepare, "recipe": "shapes-4step", "rows": rows}))
    code, _, errors = fewstep("ablate text.yaml --out out")
    assert code == 0, errors
    recipe = yaml.safe_load((Path("out") / results("text")["rows"][2]["runs"][0]["folder"] / "recipe.yaml").read_text())
    assert (recipe["data"]["source"], recipe["init_from"]) == ("out/latents", "out/shapes-1step")
    teacher = yaml.safe_load(Path("out/shapes-teacher/recipe.yaml").read_text())
    assert teacher["model"]["autoencoder"] == "out/shapes-autoencoder"
    (run,) = results("text")["rows"][2]["runs"]
    assert len(run["stops"]) == 4
    assert {"fid", "fid_mean", "prompt_accuracy", "two_objects", "diversity"} <= run["values"].keys()
    here.ran.clear()
    code, _, errors = fewstep("ablate text.yaml --out out")
    assert code == 0, errors
    assert here.ran == []


# --- with processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_process_and_ctrl_c_with_real_processes(place: Path, ranks: int) -> None:
    for seed in (0, 1):
        shutil.rmtree(run_of("pairs", seed))
    long = yaml.safe_load(Path("mine.yaml").read_text())
    long["set"] |= {"num_steps": 100_000, "checkpoint_every": 50_000}
    Path("long.yaml").write_text(yaml.safe_dump({**long, "rows": long["rows"][:1]}))
    script = "from fewstep.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        script,
        "ablate",
        "long.yaml",
        "--out",
        "out",
        "--jobs",
        "2",
        "--ranks",
        str(ranks),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:

        def began() -> list[Path]:
            return list(Path("out").glob("digits-1step-*/.lock"))

        while len(began()) < 2 or not all((path.parent / "metrics.jsonl").exists() for path in began()):
            assert running.poll() is None
            time.sleep(0.2)
        killed, other = began()
        os.kill(int(killed.read_text()), signal.SIGKILL)
        time.sleep(1 if ranks == 1 else 10)  # in which the other rank of it has ended, too
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=120)
    assert running.returncode == 130
    assert f"{killed.parent.name} (pairs): its process was killed (SIGKILL), as where memory is short\n" in errors
    assert errors.endswith("fewstep: stopped; the same command goes on with out\n")
    assert list(other.parent.glob("checkpoints/0*"))
    assert not processes_in(place)


@pytest.mark.slow
def test_two_ranks_make_the_runs_of_one_which_goes_on_with_theirs(place: Path) -> None:
    study = yaml.safe_load(Path("mine.yaml").read_text())
    study["set"] |= {"num_steps": 16, "checkpoint_every": 8}
    Path("mine.yaml").write_text(yaml.safe_dump({**study, "seeds": [1]}))
    for path in Path("out").glob("digits-*"):
        shutil.rmtree(path)
    shutil.copytree("out", "one")  # what the judge has learned is no part of this
    command = [sys.executable, "-m", "fewstep", "ablate", "mine.yaml", "--out", "out", "--jobs", "2", "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert fewstep("ablate mine.yaml --out one")[0] == 0
    half = run_of("pairs", 0)
    for path in (half / "checkpoints/00000016", half / "judged.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = last_state(Path("out", "digits-teacher"))
    assert fewstep("ablate mine.yaml --out out")[0] == 0
    assert same(last_state(Path("out", "digits-teacher")), before)
    for run in (Path("digits-teacher"), *(path.relative_to("one") for path in Path("one").glob("digits-?step-*"))):
        ours, theirs = (last_state(out / run)["method"] for out in (Path("out"), Path("one")))
        for part in ours.keys() & {"denoiser", "student", "critic", "discriminator", "ema"}:
            assert apart(ours[part], theirs[part]) < 1e-5, (run, part)


def processes_in(folder: Path) -> list[str]:
    """The command lines of this test's other processes that work there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.name != str(os.getpid()) and (process / "cwd").readlink() == folder:
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found
