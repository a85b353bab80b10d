"""Calls by graphs, without any training: passes of a network, and what a GPU itself says."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fewstep.models.pixel_model import PixelModel
from fewstep.models.sampler import Sampler, generate, generate_stops
from fewstep.runtime import graphs
from fewstep.runtime.between import between
from fewstep.runtime.graphs import MOST, Graphs, Machine
from replays import CPU

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> list[CPU]:
    """Those that record instead of a GPU."""
    found: list[CPU] = []
    monkeypatch.setattr(graphs, "CUDA", lambda device: (found.append(CPU()), found[-1])[1])
    monkeypatch.setattr(graphs, "has_graphs", lambda device: True)
    return found


@pytest.mark.parametrize("sampler", ["student:3", "heun:3@2"])
def test_pictures_are_those_of_eager_passes_at_every_batch_size(
    tiny_model: PixelModel, machines: list[CPU], monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    kind, _, steps = sampler.partition(":")
    drawn_by = Sampler(kind, int(steps[0]), 2.0 if "@" in sampler else 1.0)
    model = tiny_model.student(tiny_model.denoiser, [80.0, 2.0, 0.5])
    ours = generate(model, drawn_by, range(11), batch_size=4)  # 4, 4 and 3
    assert sum(machine.replays for machine in machines) >= 4
    assert generate_stops(model, range(5), batch_size=5).__next__()[2].shape[0] == 5
    monkeypatch.setattr(graphs, "has_graphs", lambda device: False)
    assert torch.equal(ours, generate(model, drawn_by, range(11), batch_size=4))


def test_passes_with_gradient_are_as_they_are(tiny_model: PixelModel, machines: list[CPU]) -> None:
    network = nn.Linear(3, 2)
    view, x = graphs.graphed(network, torch.device("cpu")), torch.randn(4, 3, requires_grad=True)
    for _ in range(6):
        (found,) = torch.autograd.grad(view(x).sum(), x)
        assert torch.equal(found, network.weight.sum(0).expand(4, 3))
    assert machines[0].recorded == 0
    with torch.no_grad():
        assert all(torch.equal(view(x * number), network(x * number)) for number in range(6))
    assert machines[0].replays == 3
    assert view.state_dict().keys() == network.state_dict().keys()


def test_shapes_that_never_come_again_end_it() -> None:
    told: list[str] = []
    calls = Graphs(lambda inputs, turn, random: inputs * 2, CPU(), trial=0, say=told.append)
    for size in range(1, MOST + 4):
        assert torch.equal(calls(torch.ones(size), None), torch.full((size,), 2.0))
    assert told == [f"graphs: off, steps come in more than {MOST} kinds"]
    assert not calls.kinds


def others(told: list[float], x: Tensor) -> Tensor:
    """x^2, plus what is told in the middle, times 3."""
    middle = x.square()
    between(lambda tensors: tensors[0].add_(told.pop()), [middle])
    return middle * 3


def assert_between(machine: Machine, device: str) -> None:
    told = [float(number) for number in range(8)]
    calls = Graphs(lambda x, turn, random: others(told, x), machine, trial=None)
    for number in range(8, 0, -1):
        x = torch.full((4,), float(number), device=device)
        assert torch.equal(calls(x, None).cpu(), torch.full((4,), 3.0 * (number**2 + number - 1)))
    assert not told  # once a call, the recorded one too


def test_what_is_between_recordings_is_done_anew() -> None:
    assert_between(CPU(), "cpu")


@GPU
def test_what_is_between_recordings_of_a_gpu_is_done_anew_and_keeps_no_memory() -> None:
    assert_between(graphs.CUDA(torch.device("cuda")), "cuda")

    def work(x: Tensor, turn: object, random: object) -> Tensor:
        for _ in range(4):
            large = x.expand(2**24, 4).contiguous()  # 256 MiB
            between(lambda tensors: None, [large])
            x = large.mean(0)
            del large
        return x

    calls, x = Graphs(work, machine := graphs.CUDA(torch.device("cuda")), trial=None), torch.ones(4, device="cuda")
    for _ in range(4):
        assert torch.equal(calls(x, None), x)
    assert machine.held < 2 * 2**28


@GPU
def test_a_gpu_replays_what_it_records(tiny_model: PixelModel) -> None:
    """Sums, an update and fresh numbers, with no wait for the device in any replay."""
    device = torch.device("cuda")
    network = copy.deepcopy(tiny_model.denoiser).to(device).requires_grad_(False)
    calls = Graphs(lambda given, turn, random: {"x0": network(*given)}, graphs.CUDA(device), trial=None)
    label = {"label": torch.arange(4, device=device) % 3}
    given = [(torch.randn(4, 1, 8, 8, device=device), torch.rand(4, device=device), label) for _ in range(5)]
    expected = [network(*each) for each in given]
    for each in given[:2]:
        calls(each, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [calls(each, None)["x0"] for each in given]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
