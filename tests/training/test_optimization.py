"""AdamW with its moments in 8 bits: as AdamW, skipped and resumed exactly; most of it only where bitsandbytes is."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from command_line import fewstep
from fewstep.commands.distill import distill
from fewstep.commands.teach import teach
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.parameterizations import x0
from fewstep.diffusion.schedules import VP
from fewstep.errors import Interrupted, UserError
from fewstep.networks.lora import merged
from fewstep.networks.lora_layers import lora_of, with_lora
from fewstep.networks.settings import LoRASettings
from fewstep.recipes.loading import load_recipe
from fewstep.training.optimization import Optimizer
from fewstep.training.settings import OptimizerSettings
from steps import SHORT, checked, curves, flat, interrupt_at, last_state, quiet, same

with_package = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
SETTINGS = {"lr": 1e-3, "betas": (0.8, 0.95), "weight_decay": 0.3, "eps": 1e-7, "clip_norm": 1.0, "decay": "linear"}
SHAPES = [(64, 128), (4095,), (16, 40, 3, 3)]  # the second one is too small for 8 bits


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) / 10) for shape in SHAPES]


def optimizer(kind: str, of: list[nn.Parameter]) -> Optimizer:
    return Optimizer(of, OptimizerSettings(kind=kind, **SETTINGS), 40)


def update(optimizer: Optimizer, number: int, factor: float = 1.0, finite: bool = True) -> list[float]:
    generator = torch.Generator().manual_seed(number)
    for parameter in optimizer.parameters:
        scale = 10 ** -(3 * torch.rand((), generator=generator))
        parameter.grad = factor * scale * torch.randn(parameter.shape, generator=generator)
    found = [value.item() for value in optimizer.step(torch.tensor(finite))]
    optimizer.advance()
    return found


def relative(ours: Tensor, theirs: Tensor, start: Tensor) -> float:
    return ((ours - theirs).norm() / (theirs - start).norm()).item()


@with_package
def test_twenty_updates_are_those_of_adamw_in_a_quarter_of_the_memory() -> None:
    ours, theirs, start = parameters(), parameters(), parameters()
    ours_by, theirs_by = optimizer("adamw8bit", ours), optimizer("adamw", theirs)
    for number in range(20):
        assert update(ours_by, number) == pytest.approx(update(theirs_by, number))
    errors = [relative(*each) for each in zip(ours, theirs, start, strict=True)]
    # What is too small is exact, but for the decay: the library's also shrinks the update, by lr 0.3.
    assert max(errors[0], errors[2]) < 0.03, errors
    assert errors[1] < 1e-3, errors
    kept = [
        {name: x for name, x in ours_by.adamw.state[p].items() if "qmap" not in name} for p in ours
    ]  # maps are shared
    sizes = [sum(x.nbytes for x in flat(state)) / p.numel() for state, p in zip(kept, ours, strict=True)]
    assert sizes == pytest.approx([2.031, 8, 2.031], abs=2e-3)


@with_package
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_an_update_that_is_not_finite_leaves_no_trace(where: str, first: bool) -> None:
    ours, theirs = parameters(), parameters()
    ours_by, theirs_by = optimizer("adamw8bit", ours), optimizer("adamw8bit", theirs)
    if not first:
        assert update(ours_by, 0) == update(theirs_by, 0)
    factor = float("inf") if where == "gradient" else 1.0
    assert update(ours_by, 1, factor, finite=where == "gradient")[1] == 1
    theirs_by.advance()  # the rate is a function of the run's progress
    assert same(ours, theirs)
    for number in (2, 3):
        assert update(ours_by, number)[1] == update(theirs_by, number)[1] == 0
    assert same(ours, theirs)
    assert same(ours_by.state_dict(), theirs_by.state_dict())
    assert ours_by.adamw.state[ours[0]]["step"] == 3 - first
    assert all(p.grad is None for p in ours)


@with_package
def test_the_state_is_plain_tensors_that_go_on_bit_for_bit(tmp_path: Path) -> None:
    whole, stopped = parameters(), parameters()
    whole_by, stopped_by = optimizer("adamw8bit", whole), optimizer("adamw8bit", stopped)
    for number in range(3):
        assert update(whole_by, number) == update(stopped_by, number)
    torch.save(stopped_by.state_dict(), tmp_path / "state.pt")
    again = [nn.Parameter(p.detach().clone()) for p in stopped]
    again_by = optimizer("adamw8bit", again)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert {type(x) for x in flat(state)} == {Tensor}
    again_by.load_state_dict(state)
    assert update(again_by, 3) == update(whole_by, 3)
    assert same(again, whole)
    assert same(again_by.state_dict(), whole_by.state_dict())
    checked({"critic_optimizer": state})
    scales = next(x for x in flat(state) if x.shape == (64 * 128 // 256,))
    scales[0] = float("inf")  # what an overflow leaves
    with pytest.raises(UserError, match="critic_optimizer is not finite"):
        checked({"critic_optimizer": state})


@with_package
def test_what_multiplies_follows_the_low_rank_weights() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).requires_grad_(False)
    base = Denoiser(Plain(network), VP.scaled_linear(), x0).requires_grad_(False)
    trained = with_lora(base, LoRASettings(rank=16, alpha=16, targets=["inner.0"]))
    x, t = torch.randn(2, 256), torch.tensor([10, 900])
    ours = Optimizer(trained.parameters(), OptimizerSettings(kind="adamw8bit", lr=1e-2), 10)
    for _ in range(3):
        trained(x, t, {}).square().mean().backward()
        assert ours.step(torch.tensor(True))[1] == 0
    layer = trained.network.inner[0]
    weight = merged(layer.weight, lora_of(trained.network)["inner.0"])
    expected = network[1](nn.functional.linear(x, weight, layer.bias))
    assert not torch.allclose(expected, network(x), rtol=1e-2)
    torch.testing.assert_close(trained(x, t, {}), expected, rtol=1e-5, atol=1e-5)


class Plain(nn.Module):
    """A network without time and condition."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor, condition: object) -> Tensor:
        return self.inner(x)


@with_package
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path) -> None:
    short = [*SHORT, "num_steps=6", "model.block_out_channels=[24, 24]"]  # 24 x 24 x 9 numbers are enough for 8 bits
    teach(load_recipe("digits-teacher", [*short, "optimizer.kind=adamw8bit"]), tmp_path / "teacher", report=quiet)
    told = [*short[:-1], "student_every=2", "init_from=null", f"teacher={tmp_path / 'teacher'}", "log_every=1"]
    told += [f"{role}.optimizer.kind=adamw8bit" for role in ("student", "critic")]
    recipe = load_recipe("digits-1step", told)
    distill(recipe, tmp_path / "whole", report=quiet)
    with pytest.raises(Interrupted):
        distill(recipe, tmp_path / "stopped", report=interrupt_at(3))
    distill(recipe, tmp_path / "stopped", resume=True, report=quiet)
    assert curves(tmp_path / "whole") == curves(tmp_path / "stopped")
    assert same(last_state(tmp_path / "whole"), last_state(tmp_path / "stopped"))
    moments = {x.dtype for x in flat(last_state(tmp_path / "whole")["method"]["student_optimizer"])}
    assert torch.uint8 in moments
    code, _, told = fewstep(f"distill digits-1step --resume --out {tmp_path / 'stopped'} --set teacher={tmp_path}")
    assert code == 2
    assert "student.optimizer.kind: adamw8bit -> adamw" in told


@pytest.mark.parametrize("role", ["student", "critic"])
def test_a_package_that_is_missing_is_told_before_anything_is_made(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.training.optimization.find_spec", lambda name: None)
    run, kind = tmp_path / "runs" / "run", f"{role}.optimizer.kind=adamw8bit"
    code, _, told = fewstep(f"distill digits-1step --out {run} --set {kind}")
    assert code == 2
    advice = "pip install fewstep[8bit], or set kind to adamw"
    assert told.strip() == f"fewstep: optimizer.kind=adamw8bit: the package bitsandbytes is missing; {advice}"
    assert not run.parent.exists()
