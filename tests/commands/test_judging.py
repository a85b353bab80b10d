"""A run that judges itself finds what `fewstep evaluate` finds."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.commands.distill import distill
from fewstep.commands.evaluate import evaluate
from fewstep.commands.options import Evaluate
from fewstep.commands.teach import teach
from fewstep.data.images import ImageSet
from fewstep.data.settings import DataSettings
from fewstep.errors import UserError
from fewstep.evaluation import reference
from fewstep.evaluation.extractors import train_classifier
from fewstep.evaluation.judge import classifier_path
from fewstep.metric_table import metrics_of
from fewstep.models.loading.pretrained import open_model
from fewstep.recipes.loading import load_recipe
from steps import curves

TINY = ["batch_size=8", "sample_every=100", "num_steps=4", "device=cpu", "checkpoint_every=100"]
JUDGING = ["evaluation.every=2", "evaluation.num_samples=100"]


def quiet(step: int, metrics: dict[str, float]) -> None:
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place") / "runs"
    with pytest.MonkeyPatch.context() as patch:  # a worse classifier will do
        patch.setattr("fewstep.evaluation.extractors.train_classifier", partial(train_classifier, num_steps=30))
        teach(load_recipe("digits-teacher", [*TINY, *JUDGING]), folder / "teacher", report=quiet)
    settings = [*TINY, *JUDGING, f"teacher={folder / 'teacher'}", "student_every=2"]
    distill(load_recipe("digits-4step", settings), folder / "student", report=quiet)
    return folder


def judged(runs: Path, out: Path, *names: str, **more: Any) -> None:
    """`fewstep evaluate`, without the time to measure speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.commands.evaluate.images_per_second", lambda *args: 1.0)
        more = {"num_samples": 100, "device": "cpu", "overwrite": True, **more}
        evaluate(Evaluate(runs=[f"{runs}/{name}" for name in names], out=out, **more))


def test_the_numbers_are_those_of_evaluate(runs: Path, tmp_path: Path) -> None:
    """The same noise, classes, features and averaged weights, of a teacher and of a student."""
    judged(runs, tmp_path, "teacher", "student", samplers=["heun:18"])
    rows = {row["model"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    for name in ("teacher", "student"):
        lines = [json.loads(line) for line in (runs / name / "evaluations.jsonl").read_text().splitlines()]
        assert [line.pop("step") for line in lines] == [2, 4]
        assert lines[0] != lines[1]
        assert lines[-1] == pytest.approx({metric: rows[name][metric] for metric in lines[-1]}, rel=1e-6)
        assert lines[-1].keys() == {*metrics_of("features", "classes")}


def test_images_that_are_not_finite_are_told_with_model_and_step_and_nothing_is_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.models.sampler.sample", lambda model, sampler, noise, condition: noise[0] / 0)
    with pytest.raises(UserError, match=r"^student, step 4: images 0 to 99 are not finite; take another checkpoint"):
        judged(runs, tmp_path / "out", "student")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"^broken, step 2: images 0 to 99 are not finite; take another checkpoint"):
        teach(load_recipe("digits-teacher", [*TINY, *JUDGING]), runs / "broken", report=quiet)
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


def test_judging_changes_nothing_in_the_training(runs: Path, tmp_path: Path) -> None:
    settings = [*TINY, f"teacher={runs / 'teacher'}", "student_every=2"]
    distill(load_recipe("digits-4step", settings), tmp_path / "student", report=quiet)
    assert curves(runs / "student") == curves(tmp_path / "student")
    assert not (tmp_path / "student" / "evaluations.jsonl").exists()


def test_the_best_of_a_teacher_is_distilled_where_it_is_named(runs: Path, tmp_path: Path) -> None:
    """Every step of a rate of zero leaves the student what the teacher was at the step that is named."""
    still = ["student.optimizer.lr=1e-12", "student.optimizer.weight_decay=0", "num_steps=1", "student.ema_decay=0"]
    weights = {}
    for choice in ("@2", "@4", "@best-fid"):
        settings = [*TINY, *still, f"teacher={runs / 'teacher'}{choice}"]
        distill(load_recipe("digits-1step", settings), tmp_path / choice, report=quiet)
        student, teacher = (open_model(run) for run in (tmp_path / choice, f"{runs / 'teacher'}{choice}"))
        pairs = zip(student.denoiser.parameters(), teacher.denoiser.parameters(), strict=True)
        assert all((ours - theirs).abs().max() < 1e-6 for ours, theirs in pairs)
        weights[choice] = torch.cat([p.detach().flatten() for p in student.denoiser.parameters()])
    assert (weights["@2"] - weights["@4"]).abs().max() > 1e-5
