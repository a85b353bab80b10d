"""A distillation that starts from another one's weights."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from fewstep.commands.distill import distill
from fewstep.commands.teach import teach
from fewstep.errors import UserError
from fewstep.recipes.loading import load_recipe
from fewstep.runtime.checkpoint import checkpoints, load_state
from fewstep.runtime.ema import trainable_state
from fewstep.training.dmd2 import DMD2
from steps import SHORT, SMALL, last_state, quiet, same

TINY = [*SHORT, "checkpoint_every=2", "num_steps=4"]


def fresh(teacher: Path, *overrides: str):
    return load_recipe("digits-4step", [*TINY, "student_every=1", f"teacher={teacher}", *overrides])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and distillations of four steps with the critic told the stop, without, and of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    teach(load_recipe("digits-teacher", [*TINY, *SMALL]), folder / "teacher", report=quiet)
    distill(fresh(folder / "teacher"), folder / "told", report=quiet)
    distill(fresh(folder / "teacher", "critic.condition_on_stop=false"), folder / "untold", report=quiet)
    two = ["student.num_timesteps=2", "student.timesteps=[80, 1]"]
    distill(fresh(folder / "teacher", *two), folder / "two", report=quiet)
    distill(fresh(folder / "teacher", "lora={rank: 4, alpha: 2}"), folder / "lora", report=quiet)
    lines = [{"step": 2, "fid": 1.0}, {"step": 4, "fid": 2.0}]
    (folder / "told" / "evaluations.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture
def start(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DMD2]:
    """Gives the method of a run before its first step."""

    def method(*overrides: str) -> DMD2:
        begun: list[DMD2] = []
        with monkeypatch.context() as patch:
            patch.setattr("fewstep.commands.runs.start_run", lambda job, *args: begun.append(job.method))
            distill(fresh(runs / "teacher", *overrides), tmp_path / "run", report=quiet)
        return begun[0]

    return method


def test_the_name_of_a_recipe_is_its_run_beside_this_one(runs: Path, tmp_path: Path, start: Callable) -> None:
    (tmp_path / "digits-4step").symlink_to(runs / "told")
    saved = load_state(runs / "told" / "checkpoints" / "00000002")["method"]
    assert_equal(start("init_from=digits-4step@2").student, saved["student"])
    with pytest.raises(UserError, match="digits-1step: no such run; `fewstep distill digits-1step` makes it"):
        start("init_from=digits-1step@2")


def assert_equal(module: nn.Module, weights: dict[str, Tensor]) -> None:
    assert module.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(("choice", "step"), [("", 4), ("@2", 2), ("@best-fid", 2)])
def test_student_and_critic_are_the_other_runs_and_the_rest_is_new(
    runs: Path, start: Callable, choice: str, step: int
) -> None:
    saved = load_state(runs / "told" / "checkpoints" / f"{step:08d}")["method"]
    plain, method = start(), start(f"init_from={runs / 'told'}{choice}")
    assert_equal(method.student, saved["student"])
    assert_equal(method.critic, saved["critic"])
    assert not same(method.student, saved["ema"]["averages"])
    assert same(method.ema.averages_of(), method.student)
    assert_equal(method.teacher, plain.teacher.state_dict())
    assert_equal(method.discriminator, plain.discriminator.state_dict())
    assert any(not torch.equal(a, saved["discriminator"][n]) for n, a in method.discriminator.state_dict().items())
    assert not method.student_optimizer.adamw.state
    assert not method.critic_optimizer.adamw.state
    assert method.ema.num_updates == 0


def test_the_stop_embedding_alone_may_be_missing(runs: Path, start: Callable) -> None:
    told, untold = (last_state(runs / name)["method"]["critic"] for name in ("told", "untold"))
    embedding = "network.stop_embedding.weight"
    assert told[embedding].norm() > 0
    state = start(f"init_from={runs / 'untold'}").critic.state_dict()
    assert state.pop(embedding).norm() == 0
    assert all(torch.equal(value, untold[name]) for name, value in state.items())
    state = start(f"init_from={runs / 'told'}", "critic.condition_on_stop=false").critic.state_dict()
    assert told.keys() - state.keys() == {embedding}
    assert all(torch.equal(value, told[name]) for name, value in state.items())


def test_another_number_of_timesteps_matters_to_a_critic_that_is_told_them_alone(runs: Path, start: Callable) -> None:
    saved = last_state(runs / "two")["method"]
    with pytest.raises(UserError, match=r"init_from: .*its critic is of another number of timesteps"):
        start(f"init_from={runs / 'two'}")
    method = start(f"init_from={runs / 'two'}", "critic.condition_on_stop=false")
    assert_equal(method.student, saved["student"])


def test_a_lora_starts_from_a_lora(runs: Path, start: Callable) -> None:
    saved = last_state(runs / "lora")["method"]
    method = start(f"init_from={runs / 'lora'}", "lora={rank: 4, alpha: 2}")
    for role in ("student", "critic"):
        ours = trainable_state(getattr(method, role))
        assert ours.keys() == saved[role].keys()
        assert all(torch.equal(value, saved[role][name]) for name, value in ours.items())
    assert_equal(method.teacher, start().teacher.state_dict())


@pytest.mark.parametrize(
    ("source", "lora", "theirs", "ours"),
    [
        ("told", "{rank: 4, alpha: 2}", "all weights", "a LoRA (rank 4, alpha 2.0, targets official)"),
        ("lora", "null", "a LoRA (rank 4, alpha 2.0, targets official)", "all weights"),
        ("lora", "{rank: 2, alpha: 2}", "rank 4", "rank 2"),
        ("lora", "{rank: 4, alpha: 3}", "alpha 2.0", "alpha 3.0"),
        ("lora", "{rank: 4, alpha: 2, targets: [conv1]}", "targets official", "targets ['conv1']"),
    ],
)
def test_weights_of_another_kind_are_refused(
    runs: Path, tmp_path: Path, source: str, lora: str, theirs: str, ours: str
) -> None:
    with pytest.raises(UserError) as refused:
        distill(fresh(runs / "teacher", f"init_from={runs}/{source}", f"lora={lora}"), tmp_path / "run", report=quiet)
    told = str(refused.value)
    there = runs / source / "checkpoints" / "00000004"
    assert re.fullmatch(rf"init_from: {there}: trained .*{re.escape(theirs)}.*, where .*{re.escape(ours)}.*; .*", told)
    assert not (tmp_path / "run").exists()


def test_another_lora_is_no_run_that_goes_on_nor_one_that_is_started_from(runs: Path) -> None:
    before = (runs / "lora" / "recipe.yaml").read_text()
    for lora in ("null", "{rank: 2, alpha: 2}"):
        with pytest.raises(UserError, match=r"--resume with a changed recipe \(lora.*choose another --out$"):
            distill(fresh(runs / "teacher", f"lora={lora}"), runs / "lora", resume=True, report=quiet)
    other = fresh(runs / "teacher", "lora={rank: 4, alpha: 2}", "guidance_scale=1.5")
    with pytest.raises(UserError, match=r"\(guidance_scale.*with --set init_from=.* to start from its weights$"):
        distill(other, runs / "lora", resume=True, report=quiet)
    assert (runs / "lora" / "recipe.yaml").read_text() == before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "init_from: .*nowhere: no such run folder"),
        ("teacher", "init_from: .*teacher.*00000004: holds no student; name a run of `fewstep distill`"),
        ("told@3", "init_from: .*told: has no checkpoint @3; it has @2, @4, @best-fid"),
        ("told@best-kid", "init_from: .*told: has no checkpoint @best-kid; it has @2, @4, @best-fid"),
        ("untold@best-fid", "it has @2, @4, and was not evaluated"),
        ("wide", "init_from: .*its student is of another architecture than this recipe's: network.unet"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    runs: Path, tmp_path: Path, source: str, message: str
) -> None:
    if source == "wide" and not (runs / "wide").exists():
        wide = ["model.block_out_channels=[16, 16]", "model.norm_num_groups=4"]
        teach(load_recipe("digits-teacher", [*TINY, *wide]), runs / "wide teacher", report=quiet)
        distill(fresh(runs / "wide teacher"), runs / "wide", report=quiet)
    with pytest.raises(UserError, match=message) as refused:
        distill(fresh(runs / "teacher", f"init_from={runs}/{source}"), tmp_path / "run", report=quiet)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_begun_no_longer_needs_the_other(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "told", tmp_path / "first")
    recipe = fresh(runs / "teacher", f"init_from={tmp_path / 'first'}")
    distill(recipe, tmp_path / "whole", report=quiet)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(checkpoints(tmp_path / "parts")[-1])
    shutil.rmtree(tmp_path / "first")
    distill(recipe, tmp_path / "parts", resume=True, report=quiet)
    ours, theirs = (last_state(tmp_path / name)["method"]["student"] for name in ("whole", "parts"))
    assert same(ours, theirs)
    assert yaml.safe_load((tmp_path / "whole" / "recipe.yaml").read_text())["init_from"] == str(tmp_path / "first")
