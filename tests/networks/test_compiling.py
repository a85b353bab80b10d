"""Blocks compiled in place: which are, what stays as it is, and what is told where that can't be."""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.networks import compiling
from fewstep.networks.blocks import blocks, checkpoint_blocks, checkpointed
from fewstep.networks.compiling import compile_blocks, prepare_compiling, uncompile_blocks, uncompiled
from fewstep.networks.lora_layers import Group, LowRankCopies, _trained
from fewstep.networks.settings import LoRASettings
from tiny_pipelines import unet

X_T, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0, 20.0])
TEXT = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Of compiled blocks, by the block; nothing is really compiled."""
    found: Counter = Counter()

    def counting(forward: Callable, device: str) -> Callable:
        def run(block: nn.Module, *args: object, **kwargs: object) -> object:
            found[block] += 1
            return forward(block, *args, **kwargs)

        return run

    monkeypatch.setattr(compiling, "_compiled", counting)
    return found


def run(network: nn.Module) -> list[Tensor]:
    """Output and gradients."""
    network.zero_grad()
    output = network(X_T, T, TEXT).sample
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad for parameter in network.parameters())]


@pytest.mark.parametrize("order", ["alone", "behind", "before", "inside"])
def test_every_block_is_compiled_and_recomputed_where_that_is_wanted(calls: Counter, order: str) -> None:
    network = unet(16)
    names, expected = list(network.state_dict()), run(network)
    if order == "behind":
        checkpoint_blocks(network)
    assert compile_blocks(network) == len(list(blocks(network))) == 12
    if order == "before":
        checkpoint_blocks(network)
    if order == "inside":
        with checkpointed(network):
            found = run(network)
    else:
        found = run(network)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert list(network.state_dict()) == names
    assert calls == dict.fromkeys(blocks(network), 1 if order == "alone" else 2)  # again in the backward pass
    run(network)
    assert set(calls.values()) == {{"alone": 2, "inside": 3}.get(order, 4)}  # compiled, too, behind the context
    uncompile_blocks(network)
    calls.clear()
    run(network)
    assert not calls
    assert all(("forward" in vars(block)) == (order in ("behind", "before")) for block in blocks(network))


def test_a_copy_computes_with_weights_of_its_own_and_a_view_with_the_same(calls: Counter) -> None:
    network = unet(16)
    compile_blocks(network)
    copied = copy.deepcopy(network)
    run(copied)
    assert set(calls) == set(blocks(copied))
    assert not set(calls) & set(blocks(network))


def test_blocks_with_hooks_inside_stay_as_they_are(calls: Counter) -> None:
    network = unet(16)
    inside = [network.get_submodule(name) for name in ("mid_block.resnets.0.conv1", "mid_block.attentions.0")]
    own = network.get_submodule("mid_block.resnets.1")
    seen: list[nn.Module] = []
    for module in (inside[0], own):
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    assert compile_blocks(network, hooked=network.get_submodule("down_blocks.0.resnets.0.norm1")) == 10
    run(network)
    apart = {network.get_submodule(name) for name in ("mid_block.resnets.0", "down_blocks.0.resnets.0")}
    assert set(blocks(network)) - set(calls) == apart
    assert seen == [inside[0], own]


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"^speed\.compile: the network has no blocks, in lists .*; set none$"):
        compile_blocks(nn.Linear(2, 2))


class Small(nn.Module):
    """A network of two residual blocks."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.out = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(self.to_q(x).sin())

    def __init__(self) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x


def low_rank() -> nn.Module:
    torch.manual_seed(0)
    network = Small().requires_grad_(False)
    layers = [layer for block in network.resnets for layer in (block.to_q, block.out)]
    for layer in layers:
        nn.init.normal_(_trained(layer, LoRASettings(rank=2, alpha=3.0)).lora_B)
    network.register_forward_pre_hook(LowRankCopies([Group([layer]) for layer in layers]))
    return network


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for what is compiled, by the user's own setting."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compiling.CACHE, raising=False)
    yield tmp_path / "fewstep" / "compiled"
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_low_rank_blocks_compute_the_same_and_are_compiled_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """By tracing alone, which needs no compiler, and by a compiler."""
    if backend == "inductor":
        assert prepare_compiling(torch.device("cpu")) == cache
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiling._compiled.cache_clear()
    found = []
    for compiled in (False, True):
        network, x = low_rank(), torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if compiled:
            assert compile_blocks(network) == 2
            torch._dynamo.utils.counters.clear()
        network(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in network.parameters() if p.requires_grad)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    other = torch.randn(5, 8, requires_grad=True)
    uncompiled(network)(other)  # another size, for which nothing is compiled
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    network(other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert bool([*cache.rglob("*.so")]) == (backend == "inductor")


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_so_in_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("nowhere",))
    with pytest.raises(UserError, match=r"^speed\.compile: needs g\+\+ or clang\+\+ and Python's headers \(") as told:
        prepare_compiling(torch.device("cpu"))
    assert re.fullmatch(r".*\(InvalidCxxCompiler: .*\); install them, or set none", str(told.value))
