"""Copies of weights in bfloat16: what autocast computes, bit for bit, and never stale."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.parameterizations import eps
from fewstep.diffusion.schedules import VP
from fewstep.models.latent_model import LatentModel
from fewstep.networks import precision
from fewstep.networks.blocks import blocks, checkpoint_blocks
from fewstep.networks.copies import Copied, copies_in, hold_copies, write_copies
from fewstep.networks.families.stable_diffusion import TextUNet
from fewstep.networks.features import features, x0_and_features
from fewstep.networks.lora_layers import with_lora
from fewstep.networks.precision import AutocastDenoiser, trainable
from fewstep.networks.settings import LoRASettings
from fewstep.networks.stop_embedding import condition_on_stop
from fewstep.runtime.ema import EMA, load_trainable, trainable_state
from fewstep.training.dmd2 import DMD2
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.optimization import Optimizer
from fewstep.training.roles import make_roles
from fewstep.training.settings import OptimizerSettings
from looks import looks
from steps import GAN, flat, in_parts
from tiny_pipelines import TINY, unet

X_T, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0, 20.0])
TEXT = {"text": torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1)), "stop": torch.tensor([0, 1])}
SCHEDULE = VP(torch.linspace(0.99, 0.01, 1000))


def both(stops: int = 2) -> tuple[Denoiser, Denoiser]:
    """A tiny SD's denoiser in bfloat16 under autocast alone, and with copies."""
    plain, held = (Denoiser(TextUNet(unet(16)), SCHEDULE, eps) for _ in range(2))
    for each in (plain, held) if stops else ():
        condition_on_stop(each.network, "unet.time_embedding", stops)
    return AutocastDenoiser(plain.network, SCHEDULE, eps), trainable(held, torch.bfloat16)


def passes(denoiser: Denoiser, calls: int = 1) -> list[Tensor]:
    """x0 of as many passes, whose gradients are taken together, and those of x_t and of the weights."""
    x_t = X_T.clone().requires_grad_()
    x0 = [denoiser((1 + call) * x_t, T, TEXT) for call in range(calls)]
    sum(each.square().mean() for each in x0).backward()
    gradients = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in denoiser.parameters()]
    denoiser.zero_grad()
    return [*x0, x_t.grad, *gradients]


def same(ours: list[Tensor], plain: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


class Operations(TorchDispatchMode):
    """Counts what is computed, and of the casts those of weights."""

    def __init__(self, weights: Any = ()):
        super().__init__()
        self.weights, self.counted, self.cast = {p.data_ptr() for p in weights}, Counter[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[str(func)] += 1
        if "_to_copy" in str(func):
            self.cast += args[0].data_ptr() in self.weights
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("calls", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_outputs_and_gradients_are_those_of_autocast(calls: int) -> None:
    plain, held = both()
    for _ in range(2):
        assert same(passes(held, calls), passes(plain, calls))
    with torch.no_grad():
        assert torch.equal(held(X_T, T, TEXT), plain(X_T, T, TEXT))


def test_recomputed_blocks_and_early_ends_are_those_of_autocast() -> None:
    plain, held = both()
    for layer in ("unet.mid_block", "unet.down_blocks.1", "unet.mid_block.resnets.0.conv1"):
        found = []
        for each in (held, plain):
            x_t = X_T.clone().requires_grad_()
            early = features(each, layer, x_t, T, TEXT)
            x0, beside = x0_and_features(each, layer, x_t, T, TEXT, features_only_grad=True)
            found.append([early, x0, beside, *torch.autograd.grad(early.sum() + beside.square().sum(), x_t)])
            assert all(p.grad is None for p in each.parameters())
        assert same(*found)
    for each in (held, plain):
        checkpoint_blocks(each.network)
    assert same(passes(held), passes(plain))
    assert same(passes(held, 2), passes(plain, 2))


def test_a_copy_of_a_denoiser_has_weights_and_copies_of_its_own() -> None:
    plain, held = both(stops=0)
    first = passes(held)
    copied = copy.deepcopy(held)
    for value in trainable_state(held).values():
        value.zero_()
    assert same(passes(copied), first)
    assert same(first, passes(plain))
    assert not same(passes(held), first)


def update(denoiser: Denoiser, optimizer: Optimizer) -> None:
    denoiser(X_T, T, TEXT).square().mean().backward()
    optimizer.step(torch.tensor(True))


def test_updates_with_averages_applied_between_them_are_those_of_autocast() -> None:
    found = []
    for denoiser in both():
        ema, values = EMA(denoiser, 0.5), []
        optimizer = Optimizer(denoiser.parameters(), OptimizerSettings(lr=1e-2), 10)
        for _ in range(3):
            update(denoiser, optimizer)
            ema.update()
            with ema.applied(), torch.no_grad():
                values.append(denoiser(X_T, T, TEXT))
        found.append([*values, *denoiser.parameters(), *passes(denoiser)])
    assert same(*found)
    assert not torch.equal(*values[1:])


WRITES: dict[str, Callable[[Denoiser], Any]] = {
    "optimizer": lambda each: update(each, Optimizer(each.parameters(), OptimizerSettings(lr=1e-2), 10)),
    "state": lambda each: load_trainable(each, {n: 0.5 * value for n, value in trainable_state(each).items()}),
    "foreach": lambda each: torch._foreach_lerp_(
        [*trainable_state(each).values()], [torch.zeros_like(p) for p in each.parameters()], 0.1
    ),
}


@pytest.mark.parametrize("write", WRITES)
def test_copies_follow_whoever_writes_the_weights_and_stay_where_they_are(write: str) -> None:
    plain, held = both()
    first = passes(held)
    (copies,) = copies_in(held)
    at = [each.data_ptr() for each in copies.copies]
    for each in (held, plain):
        WRITES[write](each)
    with EMA(held, 0.5).applied():  # the same values, written twice
        write_copies(held)
    after = passes(held)
    assert same(after, passes(plain))
    assert not torch.equal(after[0], first[0])
    assert [each.data_ptr() for each in copies.copies] == at
    multiplied = {p.data_ptr() for m in held.modules() if isinstance(m, Copied) for p in m.held.traced if p is not None}
    assert multiplied == set(at)


def test_nothing_is_done_where_nothing_changed_and_the_host_never_looks() -> None:
    for denoiser in (both()[1], with_lora(both()[0].requires_grad_(False), LoRASettings(rank=2))):
        write_copies(denoiser)
        with looks() as found, Operations() as operations:
            write_copies(denoiser)
            assert not operations.counted
            for value in trainable_state(denoiser).values():
                value.mul_(2)
            before = operations.counted.total()
            write_copies(denoiser)
        assert not found
        assert 1 <= operations.counted.total() - before <= 2  # of all weights together


def test_no_weight_is_cast_and_no_operation_is_added() -> None:
    counts = []
    for denoiser in both():
        passes(denoiser)
        with Operations([*denoiser.parameters()]) as operations:
            x0 = denoiser(X_T, T, TEXT)
            forward = operations.cast, operations.counted.total()
            x0.sum().backward()
        counts.append((*forward, operations.counted.total()))
    weights = [p for m in denoiser.modules() if isinstance(m, nn.Linear | nn.Conv2d) for p in m._parameters.values()]
    num = sum(p is not None for p in weights)
    (of_plain, *plain), (of_held, *held) = counts
    assert (of_plain, of_held) == (num, 0)
    assert [before - after for before, after in zip(plain, held, strict=True)] == [num, num]


def test_gradients_in_bfloat16_do_not_lie_until_the_end_of_a_backward_pass() -> None:
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    hold_copies(layers)
    order: list[str] = []
    for i, layer in enumerate(layers):
        layer.weight.register_post_accumulate_grad_hook(lambda _, i=i: order.append(f"weight {i}"))
        layer.register_forward_hook(
            lambda module, given, out, i=i: out.register_hook(lambda _: order.append(f"output {i}")) and None
        )
    for _ in range(3):
        order.clear()
        with torch.autocast("cpu", torch.bfloat16):
            layers(torch.randn(2, 4)).sum().backward()
        assert order == ["output 2", "weight 2", "output 1", "weight 1", "output 0", "weight 0"]


def test_names_kinds_and_float32_stay_as_they_are() -> None:
    plain, held = both()
    passes(held)
    assert list(held.state_dict()) == list(plain.state_dict())
    assert trainable_state(held).keys() == trainable_state(plain).keys()
    for ours, theirs in zip(held.modules(), plain.modules(), strict=True):
        assert isinstance(ours, type(theirs))
    x = X_T, T, TEXT
    with torch.no_grad():
        assert torch.equal(held.network(*x), plain.network(*x))  # without autocast
    assert held.network(*x).dtype == torch.float32
    ours = Denoiser(plain.network, SCHEDULE, eps)
    assert trainable(ours, torch.float32) is ours
    assert not [*copies_in(ours)]
    held.requires_grad_(False)
    assert not held(*x).requires_grad


def test_weights_that_change_between_a_pass_and_its_gradients_are_an_error() -> None:
    _, held = both()
    output = held(X_T, T, TEXT)
    for value in trainable_state(held).values():
        value.mul_(2)
    write_copies(held)
    with pytest.raises(RuntimeError, match=r"modified.* inplace"):
        output.sum().backward()


@pytest.mark.slow
def test_compiled_blocks_multiply_with_the_copies() -> None:
    """Traced as one piece each, once for all passes with gradients, whose tensors differ."""
    denoisers = both()
    for denoiser in denoisers:
        for block in blocks(denoiser.network):
            block.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=64):
        passes(denoisers[0])
        torch._dynamo.utils.counters.clear()
        for _ in range(3):
            held, plain = (passes(each) for each in reversed(denoisers))
            assert same(held, plain)
            for denoiser in denoisers:
                torch._foreach_mul_([*trainable_state(denoiser).values()], 0.9)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= len([*blocks(denoisers[1].network)])
    with Operations([*denoisers[1].parameters()]) as operations:
        denoisers[1](X_T, T, TEXT)
    assert operations.cast == 0


def steps(model: LatentModel, checkpointing: str, changes: dict, num: int) -> list[Tensor]:
    """What training leaves, and what the averages gave between its steps."""
    settings = DMD2Settings(
        student_every=2,
        student={"num_timesteps": 2, "optimizer": {"lr": 1e-3}, "ema_decay": 0.5},
        critic={"optimizer": {"lr": 1e-3}, **changes.pop("critic", {})},
        **{"gan": {"student_weight": 0.1, "critic_weight": 0.1}, "checkpointing": checkpointing, **changes},
    )
    stops = 2 if settings.critic.condition_on_stop else 0
    torch.manual_seed(0)
    roles = make_roles(model, 8.0, num_stops=stops, dtype=torch.bfloat16, checkpointing=checkpointing)
    method = DMD2(settings, model, roles, 10, 4, seed=0)
    batch = {"latent": torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)), "caption": list("abcd")}
    found = []
    for step in range(num):
        metrics = method.step(in_parts(batch, 4, 2), step)
        with method.ema.applied(), torch.no_grad():
            found += [*metrics.values(), roles.student(X_T, T, model.text_condition(["a", "b"]))]
    return [*found, *flat([roles.student, roles.critic])]


CASES: dict[str, tuple[str, dict]] = {
    "one pass for both": ("none", {"gan": {**GAN, "independent_noise": False}}),
    "R1": ("blocks", {"gan": {**GAN, "r1_weight": 1.0}}),
    "diversity": ("gan", {"diversity": {"weight": 0.1, "steps": 2}}),
    "own samples": ("blocks", {"critic": {"samples": "cycle", "condition_on_stop": True}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_autocast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    checkpointing, changes = CASES[case]
    found = []
    for hold in (hold_copies, lambda network: None):
        monkeypatch.setattr(precision, "hold_copies", hold)
        model = LatentModel(TINY["sdxl"](tmp_path / hold.__name__))
        model.encode_in(torch.bfloat16)
        found.append(steps(model, checkpointing, copy.deepcopy(changes), 4))
    assert same(*found)
    assert not torch.equal(found[0][1], found[0][-1])
