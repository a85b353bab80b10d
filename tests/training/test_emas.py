"""Several averages of one student: saved, judged, resumed and found by name; one average is as it was."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.commands.distill import distill
from fewstep.commands.evaluate import evaluate
from fewstep.commands.options import Evaluate
from fewstep.commands.teach import teach
from fewstep.errors import Interrupted, UserError
from fewstep.metric_table import metrics_of
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load, open_model
from fewstep.recipes.loading import load_recipe
from fewstep.recipes.schema import DistillRecipe
from fewstep.runtime.checkpoint import checkpoints, load_state
from fewstep.runtime.runs import best_steps, find
from fewstep.runtime.tracking import read_metrics
from fewstep.training.dmd2 import DMD2
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.roles import make_roles
from steps import SHORT, SMALL, curves, flat, interrupt_at, last_state, quiet, same
from tiny_pipelines import TINY as TINY_PIPELINES

TINY = [*SHORT, "log_every=2", "checkpoint_every=4"]
UNLABELLED = ["model.num_classes=0", "model.null_class=false", "class_dropout=0"]  # no classifier is trained to judge
LR = ["student.optimizer.lr=1e-2"]
DECAYS = "student.ema_decay=[0.2, 0.05, 0]"
OTHERS = ("0.05", "0")
MODELS = ("model", "model-ema0.05", "model-ema0")


class Moments(torch.nn.Module):
    """A feature network: uint8 (B, 3, H, W) -> (B, 6), means and deviations of the rows' brightness."""

    def forward(self, images: Tensor) -> Tensor:
        rows = images.float().mean(dim=1).mean(dim=2)
        return torch.cat([rows[:, ::3], rows[:, 1::3]], dim=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's run, a feature network, and a student's run with three averages that judged itself."""
    folder = tmp_path_factory.mktemp("emas")
    torch.jit.script(Moments()).save(folder / "features.pt")
    teach(load_recipe("digits-teacher", [*TINY, *SMALL, *UNLABELLED]), folder / "teacher", report=quiet)
    distill(recipe(folder), folder / "whole", report=quiet)
    return folder


def recipe(folder: Path, *overrides: str) -> DistillRecipe:
    judging = ["evaluation.every=4", "evaluation.time_share=1", "evaluation.num_samples=60"]
    judging.append(f"evaluation.features={folder / 'features.pt'}")
    settings = ["student_every=2", "init_from=null", f"teacher={folder / 'teacher'}", DECAYS, *LR, *judging]
    return load_recipe("digits-1step", [*TINY, *settings, *overrides])


def weights(folder: Path) -> Tensor:
    return joined(load(folder).denoiser)


def joined(state: object) -> Tensor:
    return torch.cat([value.detach().flatten() for value in flat(state)])


def test_every_average_is_saved_as_a_model_of_its_own(place: Path) -> None:
    (*_, newest) = checkpoints(place / "whole")
    assert {path.name for path in newest.iterdir()} == {*MODELS, "state", "manifest.json"}
    first, *others = (weights(newest / name) for name in MODELS)
    state = load_state(newest)["method"]
    trained = joined(state["student"])
    assert torch.equal(others[1], trained)  # a decay of 0 keeps no history
    assert torch.equal(first, joined(state["ema"]["averages"]))
    assert torch.equal(others[0], joined(state["ema"]["others"]["0.05"]))
    distances = [(each - trained).norm().item() for each in (first, *others)]
    assert distances[0] > distances[1] > distances[2] == 0


def test_every_average_is_judged_under_its_name_and_its_best_is_kept(place: Path) -> None:
    lines = read_metrics(place / "whole" / "evaluations.jsonl")
    judged = metrics_of("features", "colours")
    names = {f"{prefix}{name}" for prefix in ("", "ema0.05_", "ema0_") for name in judged}
    assert [(line["step"], line.keys() - {"step"}) for line in lines] == [(step, names) for step in (4, 8, 12)]
    assert all(len({line["fid"], line["ema0.05_fid"], line["ema0_fid"]}) == 3 for line in lines)
    kept = {int(path.name) for path in checkpoints(place / "whole")}
    assert kept == {8, 12} | set(best_steps(lines).values())


def test_one_decay_in_a_list_is_that_decay(place: Path, tmp_path: Path) -> None:
    """State, files and numbers are what they are without the list."""
    for name, decay in (("one", "0.9"), ("listed", "[0.9]")):
        settings = [f"student.ema_decay={decay}", "evaluation.every=null"]
        distill(recipe(place, *settings), tmp_path / name, report=quiet)
        newest = checkpoints(tmp_path / name)[-1]
        assert {path.name for path in newest.iterdir()} == {"model", "state", "manifest.json"}
    ours, theirs = (last_state(tmp_path / name) for name in ("one", "listed"))
    assert ours["method"]["ema"].keys() == {"averages", "num_updates"}
    assert same(ours, theirs)


def test_further_averages_change_nothing_in_training_or_in_the_first(place: Path, tmp_path: Path) -> None:
    distill(recipe(place, "student.ema_decay=0.2"), tmp_path / "run", report=quiet)
    assert curves(tmp_path / "run") == curves(place / "whole")
    ours, theirs = (read_metrics(run / "evaluations.jsonl") for run in (tmp_path / "run", place / "whole"))
    assert ours == [{name: line[name] for name in ours[0]} for line in theirs]
    assert torch.equal(weights(find(f"{tmp_path}/run").folder), weights(find(f"{place}/whole").folder))


@pytest.mark.parametrize("stop", [5, pytest.param(8, marks=pytest.mark.slow)])
def test_a_stopped_run_with_several_averages_resumes_exactly(place: Path, tmp_path: Path, stop: int) -> None:
    with pytest.raises(Interrupted):
        distill(recipe(place), tmp_path / "parts", report=interrupt_at(stop))
    distill(recipe(place), tmp_path / "parts", resume=True, report=quiet)
    assert curves(tmp_path / "parts") == curves(place / "whole")
    ours, theirs = ((run / "evaluations.jsonl").read_text() for run in (tmp_path / "parts", place / "whole"))
    assert ours == theirs
    assert same(last_state(tmp_path / "parts"), last_state(place / "whole"))
    ours, theirs = (checkpoints(run)[-1] for run in (tmp_path / "parts", place / "whole"))
    assert all(torch.equal(weights(ours / name), weights(theirs / name)) for name in MODELS)


def test_a_model_is_opened_by_its_average(place: Path) -> None:
    run, best = place / "whole", best_steps(read_metrics(place / "whole" / "evaluations.jsonl"))
    found = find(f"{run}@best-ema0.05_fid")
    assert (found.step, found.ema) == (best["ema0.05_fid"], "0.05")
    assert same(open_model(f"{run}@best-ema0.05_fid").denoiser, load(found.folder).denoiser)


def test_evaluate_has_a_row_for_each_with_the_numbers_of_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.commands.evaluate.images_per_second", lambda *args: 1.0)
    features = str(place / "features.pt")
    runs = [f"{place}/whole@8", f"{place}/teacher"]
    evaluate(Evaluate(runs=runs, out=tmp_path, features=features, num_samples=60, samplers=["ddim:2"], device="cpu"))
    rows = {row["model"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    assert list(rows) == ["real", "whole@8", "whole@8 ema0", "whole@8 ema0.05", "teacher"]
    line = read_metrics(place / "whole" / "evaluations.jsonl")[1]
    assert rows["whole@8"]["fid"] == pytest.approx(line["fid"], rel=1e-6)
    for ema in OTHERS:
        assert rows[f"whole@8 ema{ema}"]["fid"] == pytest.approx(line[f"ema{ema}_fid"], rel=1e-6)


def test_a_second_stage_starts_from_the_best_of_an_average(place: Path, tmp_path: Path) -> None:
    still = ["student.optimizer.lr=1e-12", "student.optimizer.weight_decay=0", "num_steps=2", "evaluation.every=null"]
    start = f"{place}/whole@best-ema0.05_fid"
    distill(recipe(place, *still, f"init_from={start}"), tmp_path / "second", report=quiet)
    trained = joined(load_state(find(start).checkpoint)["method"]["student"])
    for name in MODELS:
        assert (weights(checkpoints(tmp_path / "second")[-1] / name) - trained).abs().max() < 1e-6


@pytest.mark.parametrize(
    "decays", ["[0.9, 0.9]", "[]", "[0.9, 1]", "[0.9, -0.1]", "[[0.9]]", "1", "-0.5", "none", "{}"]
)
def test_decays_that_are_no_decays_are_refused(decays: str) -> None:
    wanted = r"student\.ema_decay: takes a number from 0 to below 1, or a list of different ones, at most 16, not "
    with pytest.raises(UserError, match=wanted):
        load_recipe("digits-1step", [f"student.ema_decay={decays}"])


def test_a_run_cannot_resume_with_other_averages(place: Path) -> None:
    with pytest.raises(UserError, match=r"changed recipe \(student\.ema_decay: \[0\.2, 0\.05, 0\.0\] -> 0\.2\)"):
        distill(recipe(place, "student.ema_decay=0.2"), place / "whole", resume=True, report=quiet)


def test_the_averages_of_a_text_model_share_what_is_frozen(tmp_path: Path) -> None:
    """Each is a whole pipeline; autoencoder and text encoder lie on the disk once."""
    model = LatentModel(TINY_PIPELINES["sd"](tmp_path / "scratch"))
    settings = DMD2Settings(student={"ema_decay": [0.9, 0.5]}, gan={"student_weight": 0, "critic_weight": 0})
    method = DMD2(settings, model, make_roles(model), num_steps=1, batch_size=1, seed=0)
    method.save_model(tmp_path / "model", method.state_dict(), tmp_path / "frozen")
    weights = "vae/diffusion_pytorch_model.safetensors"
    places = [tmp_path / name / weights for name in ("model", "model-ema0.5", "frozen")]
    assert len({path.stat().st_ino for path in places}) == 1
    assert isinstance(load(tmp_path / "model-ema0.5"), LatentModel)
