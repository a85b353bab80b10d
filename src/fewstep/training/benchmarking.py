"""How fast a distillation is on this machine: its own step, on weights of the real shapes that nobody has trained."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.models.outline import Outline
from fewstep.networks.precision import DTYPES
from fewstep.runtime.graphs import CUDA, Graphs
from fewstep.runtime.tracking import peak_memory
from fewstep.training.batches import rows_of_rank
from fewstep.training.dmd2 import DMD2
from fewstep.training.method import Compute, Part
from fewstep.training.parallel import check_units, divide, offload
from fewstep.training.roles import compile_roles, roles_of, uncompile_roles

SECONDS = 0.5  # of products of matrices, behind which a rate no longer rises
WAYS = ("eager", "graphs", "compiled", "compiled+graphs")  # that a step can be run in
WIDTH = {"cuda": 8192, "cpu": 1024}  # of these matrices


@dataclass(frozen=True)
class Timing:
    """What cycles took, each of one update of the student and those of the critic up to the next."""

    seconds: list[float]
    """Of each cycle, the stops in turn."""
    peak: int
    """Bytes, as `peak_memory` has them."""
    operations: float
    """That the host starts in a cycle, each at least one kernel."""
    busy: float | None
    """Share of the time in which a GPU computes; None on a CPU."""

    @property
    def cycle(self) -> float:
        """Mean seconds."""
        return mean(self.seconds)


class _Counter(TorchDispatchMode):
    """Counts operations, those of backward passes and optimizers among them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += 1
        return func(*args, **(kwargs or {}))


def make_method(recipe: Any, outline: Outline, device: torch.device) -> DMD2:
    """The recipe's method around freshly initialised networks; losses on pairs are left out."""
    model, shared, gan = outline.fresh(), recipe.parallel.shard != "none", recipe.gan.student_weight > 0
    torch.manual_seed(0)
    model.device = torch.device("cpu") if shared else device
    initialize(model.denoiser.to_empty(device=model.device))
    roles, units = roles_of(recipe, model, shared), None
    if shared:
        check_units(roles, gan)
        units = divide(roles, recipe.parallel, device, DTYPES[recipe.precision], gan)
        model.device = device
    method = DMD2(recipe, model, roles, recipe.num_steps, recipe.batch_size, recipe.seed)
    if units:
        units.given_to(method)
    if recipe.parallel.offload_student_optimizer:
        offload(method)
    return method


@torch.no_grad()
def initialize(network: nn.Module) -> None:
    """As its layers begin, and zeros where none says: numbers that stay finite, so that no update is skipped."""
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.zero_()
    for module in network.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()


def parts_of(recipe: Any, outline: Outline, device: torch.device) -> list[Part]:
    """This rank's rows of a batch in their parts, on the device."""
    parts = rows_of_rank(recipe)
    batch = {name: value.to(device) for name, value in outline.batch(len(parts[0])).items()}
    batch["x0"] = torch.randn_like(batch["x0"])
    return [(rows, batch) for rows in parts]


def time_ways(method: DMD2, parts: list[Part], num: int, ways: Sequence[str]) -> Iterator[tuple[str, Timing | str]]:
    """Each of these `WAYS` with its timing, or with why a machine can't go it."""
    for way in ways:
        compiled, recorded = "compiled" in way, "graphs" in way
        told: list[str] = []
        if compiled:
            compile_roles(method)
        graphs = (
            Graphs(method.compute, CUDA(method.model.device), method.settle, None, told.append) if recorded else None
        )
        timing = time_cycles(method, parts, num, graphs)
        yield way, told[0] if told else timing
        uncompile_roles(method)


def time_cycles(method: DMD2, parts: list[Part], num: int, run: Compute | None = None) -> Timing:
    """At least `num` cycles by `run`, behind those that warm up; where a batch has one stop, all of them equally often.

    Also those whose every step was one of a kind: graphs are recorded at the second one.
    """
    device, every, student = method.model.device, method.settings.student_every, method.settings.student
    one = student.stops == "shared" and student.timesteps != "random"
    stops = list(range(method.fakes.first, method.num_noises)) if one else [0]
    numbers = count()

    def cycle(stop: int) -> None:
        for number in islice(numbers, every):
            method.step(parts, number, method.turn(number, stop if one else None), run)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # here, for a replay asks for nothing
    for stop in [*stops, *(stops if run else [])]:
        cycle(stop)
    rounds = -(-num // len(stops))
    seconds = [_seconds(device, cycle, stop) for _ in range(rounds) for stop in stops]
    peak = peak_memory(device)
    with _Counter() as counter:
        for stop in stops:
            cycle(stop)
    return Timing(seconds, peak, counter.num / len(stops), _busy(device, cycle, stops))


def _seconds(device: torch.device, work: Callable[..., Any], *given: Any) -> float:
    _wait(device)
    began = time.perf_counter()
    work(*given)
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _busy(device: torch.device, cycle: Callable[[int], None], stops: list[int]) -> float | None:
    """The kernels' time over that of the same cycle, of the first stop, without a profiler, which slows the host."""
    if device.type != "cuda":
        return None
    alone = _seconds(device, cycle, stops[0])
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        cycle(stops[0])
        _wait(device)
    # As they were noted: what PyTorch makes of a hundred thousand of them takes minutes.
    events: Any = found.profiler.kineto_results.events()
    return float(sum(each.duration_ns() for each in events if each.device_type().name == "CUDA")) / 1e9 / alone


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in products of large matrices: the most that the machine gives, 2 n^3 each."""
    a = torch.randn(WIDTH[device.type], WIDTH[device.type], device=device, dtype=dtype)
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        best = max(best, 2 * len(a) ** 3 / _seconds(device, torch.mm, a, a))
    return best
