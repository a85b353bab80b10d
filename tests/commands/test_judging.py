"""A run that judges itself finds what `fewstep evaluate` finds."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.commands.distill import distill
from fewstep.commands.evaluate import command_line, evaluate, holds_results
from fewstep.commands.options import Evaluate
from fewstep.commands.places import free_place
from fewstep.commands.teach import teach
from fewstep.data.images import ImageSet
from fewstep.data.settings import DataSettings
from fewstep.embedded.sources import digits
from fewstep.errors import UserError
from fewstep.evaluation import reference
from fewstep.evaluation.extractors import train_classifier
from fewstep.evaluation.judge import classifier_path
from fewstep.metric_table import metrics_of
from fewstep.models.loading.pretrained import open_model
from fewstep.pictures import save_png, to_picture
from fewstep.recipes.loading import load_recipe
from steps import SMALL, curves

STEPS = ["batch_size=8", "sample_every=100", "num_steps=4", "device=cpu", "checkpoint_every=100"]
JUDGING = ["evaluation.every=2", "evaluation.time_share=1", "evaluation.num_samples=100"]


def quiet(step: int, metrics: dict[str, float]) -> None:
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place") / "runs"
    with pytest.MonkeyPatch.context() as patch:  # a worse classifier will do
        patch.setattr("fewstep.evaluation.extractors.train_classifier", partial(train_classifier, num_steps=30))
        teach(load_recipe("digits-teacher", [*STEPS, *SMALL, *JUDGING]), folder / "teacher", report=quiet)
    settings = [*STEPS, *JUDGING, f"teacher={folder / 'teacher'}", "student_every=2"]
    distill(load_recipe("digits-4step", settings), folder / "student", report=quiet)
    return folder


def judged(runs: Path, out: Path, *names: str, **more: Any) -> None:
    """`fewstep evaluate`, without the time to measure speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.commands.evaluate.images_per_second", lambda *args: 1.0)
        more = {"num_samples": 100, "device": "cpu", "overwrite": True, **more}
        evaluate(Evaluate(runs=[name if name.startswith("/") else f"{runs}/{name}" for name in names], out=out, **more))


def test_the_numbers_are_those_of_evaluate(runs: Path, tmp_path: Path) -> None:
    """The same noise, classes, features and averaged weights, of a teacher and of a student."""
    judged(runs, tmp_path, "teacher", "student", samplers=["heun:18"])
    rows = {row["model"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    for name in ("teacher", "student"):
        lines = [json.loads(line) for line in (runs / name / "evaluations.jsonl").read_text().splitlines()]
        assert [line.pop("step") for line in lines] == [2, 4]
        assert lines[0] != lines[1]
        assert lines[-1] == pytest.approx({metric: rows[name][metric] for metric in lines[-1]}, rel=1e-6)
        assert lines[-1].keys() == {*metrics_of("features", "classes", "colours", "prompts")}


def test_model_folders_and_folders_of_images_are_judged_as_runs_are(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.parent)  # where `runs` holds what other tests have gathered
    (tmp_path / "real").mkdir()
    for index, image in enumerate(digits().fetch(torch.arange(200))):
        save_png(to_picture(image), tmp_path / "real" / f"{index}.png")
    shutil.copytree(next((runs / "student" / "checkpoints").glob("*4")) / "model", tmp_path / "exported")
    judged(runs, tmp_path / "out", "student", f"{tmp_path}/real", f"{tmp_path}/exported")
    floor, *rows = json.loads((tmp_path / "out" / "results.json").read_text())
    student, exported, real = rows
    assert [row["model"] for row in rows] == ["student", "exported", "real"]
    assert {**exported, "model": "student"} == student
    assert (real["sampler"], real["nfe"], real["accuracy"]) == ("images", None, None)
    assert real["fid"] < student["fid"] / 10
    assert (real["precision"], real["recall"]) > (0.9, 0.5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data: digits<br>" in page
    assert "command: fewstep" in page
    judged(runs, tmp_path / "alone", f"{tmp_path}/exported", data="digits")
    alone = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert alone == [{**floor, "intervals": None}, exported]


def test_what_can_not_be_judged_is_one_line_and_nothing_is_overwritten(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    save_png(to_picture(torch.zeros(1, 8, 8, dtype=torch.uint8)), tmp_path / "few" / "0.png")
    model = next((runs / "student" / "checkpoints").glob("*4")) / "model"
    (tmp_path / "out").mkdir()
    for names, told in {
        (f"{tmp_path}/few",): "few: images, and no run that would say what they are compared with; give --data",
        ("student", f"{tmp_path}/few"): "few: has 1 images; judging needs at least 40",
        (str(model),): "model: is no run, which would say what it is compared with; name images with --data",
        ("student", "nowhere"): "nowhere: no such run folder",
    }.items():
        with pytest.raises(UserError, match=told):
            judged(runs, tmp_path / "out", *names)
    with pytest.raises(UserError, match=r"only a single .safetensors file takes another"):
        judged(runs, tmp_path / "out", "student", config=str(model))
    assert not [*(tmp_path / "out").iterdir()]
    (tmp_path / "out" / "report.html").write_text("precious")
    with pytest.raises(UserError, match=r"--out .*/out: exists already; replace it with --overwrite"):
        judged(runs, tmp_path / "out", "student", overwrite=False)
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_evaluations_are_numbered_where_no_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("evaluation", "evaluation-2"):
        place = free_place(None, Path("evaluation"), holds_results, overwrite=False)
        assert place == Path(name)
        place.mkdir()
        assert free_place(None, Path("evaluation"), holds_results, overwrite=False) == place
        (place / "results.json").write_text("[]")
    assert free_place(None, Path("evaluation"), holds_results, overwrite=True) == Path("evaluation")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["evaluate", "runs/a", "/home/me/x/b", "~/c"], "fewstep evaluate runs/a b c"),
        (
            ["evaluate", "../up/a", "--data=/srv/secret/photos", "--seed", "3"],
            "fewstep evaluate a --data=photos --seed 3",
        ),
        (["teach", "--set", "data.source=/home/me/my photos"], "fewstep teach --set 'data.source=my photos'"),
        (["evaluate", "a@best-fid", "owner/name"], "fewstep evaluate a@best-fid owner/name"),
    ],
)
def test_the_command_is_shown_without_where_things_lie(
    words: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/fewstep", *words])
    assert command_line() == shown


def test_images_that_are_not_finite_are_told_with_model_and_step_and_nothing_is_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.models.sampler.sample", lambda model, sampler, noise, condition: noise[0] / 0)
    with pytest.raises(UserError, match=r"^student, step 4: images 0 to 99 are not finite; take another checkpoint"):
        judged(runs, tmp_path / "out", "student")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"^broken, step 2: images 0 to 99 are not finite; take another checkpoint"):
        teach(load_recipe("digits-teacher", [*STEPS, *SMALL, *JUDGING]), runs / "broken", report=quiet)
    assert not (runs / "broken" / "evaluations.jsonl").exists()


def test_the_reals_are_gathered_once_and_again_for_another_network_or_number(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs judged themselves: `evaluate` finds what they kept, the classifier as well."""
    (kept,) = runs.glob("reference-digits-*.safetensors")
    before = kept.stat().st_mtime_ns
    gathered: list[str] = []
    real = reference.labelled_batches
    monkeypatch.setattr(reference, "labelled_batches", lambda images, num: gathered.append(num) or real(images, num))

    def floor(num_real: int) -> dict[str, float]:
        judged(runs, tmp_path, "student", num_real=num_real)
        return json.loads((tmp_path / "results.json").read_text())[0]

    whole = floor(50_000)
    assert len(list(runs.glob("classifier-digits-*.safetensors"))) == 1
    assert (gathered, kept.stat().st_mtime_ns) == ([], before)
    assert floor(500) != whole
    assert floor(500) != whole
    assert gathered == [500]
    kept.write_bytes(kept.read_bytes()[:100])  # damaged: it is made again
    assert floor(50_000) == whole
    assert gathered == [500, 1797]


def test_sources_of_the_same_name_or_of_other_content_are_told_apart(tmp_path: Path) -> None:
    first, second = (classifier_path(DataSettings(source=f"{place}/train"), Path()) for place in "ab")
    assert first != second
    data, images = DataSettings(source=str(tmp_path)), ImageSet(lambda indices: indices, None, 2, ["a", "b"])
    before = reference.identity(images, data)
    assert reference.identity(images, data) == before != reference.identity(replace(images, captions=["a", "c"]), data)
    (tmp_path / "dangling.png").symlink_to("nowhere")
    assert reference.identity(images, data) == before
    (tmp_path / "new.png").write_bytes(b"picture")
    assert reference.identity(images, data) != before


def test_a_run_is_judged_by_all_that_its_recipe_names(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `fewstep evaluate` is by its options; a share of the time leaves out all between the first and the last."""
    monkeypatch.syspath_prepend(tmp_path)
    scorer = "def score(self, images, prompts): return images.float().mean((1, 2, 3))"
    (tmp_path / "own_scorers.py").write_text(f"class Grey:\n    def __init__(self, device): pass\n    {scorer}\n")
    (tmp_path / "runs").mkdir()
    for classifier in runs.glob("classifier-*"):  # which takes longer than all else
        shutil.copy(classifier, tmp_path / "runs")
    asked = ["evaluation.scorers=[own_scorers:Grey]", "evaluation.every=1", "evaluation.num_samples=60"]
    settings = [*STEPS, *asked, "evaluation.time_share=1e-9", f"teacher={runs / 'teacher'}"]
    distill(load_recipe("digits-4step", settings), tmp_path / "runs" / "student", report=quiet)
    lines = [json.loads(line) for line in (tmp_path / "runs/student/evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4]
    judged(tmp_path / "runs", tmp_path / "out", "student", num_samples=60, scorers=["own_scorers:Grey"])
    row = json.loads((tmp_path / "out" / "results.json").read_text())[1]
    assert lines[-1]["grey"] == pytest.approx(row["grey"], rel=1e-6)
    assert 0 < row["grey"] < 255


def test_judging_changes_nothing_in_the_training(runs: Path, tmp_path: Path) -> None:
    settings = [*STEPS, f"teacher={runs / 'teacher'}", "student_every=2"]
    distill(load_recipe("digits-4step", settings), tmp_path / "student", report=quiet)
    assert curves(runs / "student") == curves(tmp_path / "student")
    assert not (tmp_path / "student" / "evaluations.jsonl").exists()


def test_the_best_of_a_teacher_is_distilled_where_it_is_named(runs: Path, tmp_path: Path) -> None:
    """Every step of a rate of zero leaves the student what the teacher was at the step that is named."""
    still = ["student.optimizer.lr=1e-12", "student.optimizer.weight_decay=0", "num_steps=1", "student.ema_decay=0"]
    weights = {}
    for choice in ("@2", "@4", "@best-fid"):
        settings = [*STEPS, *still, f"teacher={runs / 'teacher'}{choice}", "init_from=null"]
        distill(load_recipe("digits-1step", settings), tmp_path / choice, report=quiet)
        student, teacher = (open_model(run) for run in (tmp_path / choice, f"{runs / 'teacher'}{choice}"))
        pairs = zip(student.denoiser.parameters(), teacher.denoiser.parameters(), strict=True)
        assert all((ours - theirs).abs().max() < 1e-6 for ours, theirs in pairs)
        weights[choice] = torch.cat([p.detach().flatten() for p in student.denoiser.parameters()])
    assert (weights["@2"] - weights["@4"]).abs().max() > 1e-5
