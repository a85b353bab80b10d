"""Calls as CUDA graphs: what the host starts kernel by kernel is recorded once, and then replayed as a whole.

A recording holds addresses, not values: what goes in lies in tensors that stay where they are and are filled before a
replay, random numbers among them, which are drawn as an eager call draws them. Whatever the host decides, counts or
remembers is in no replay, so that calls that differ by it are told apart by their `turn`.
"""

import gc
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Generator, Tensor, nn

from fewstep.errors import brief, out_of_memory
from fewstep.runtime.between import Work, cut_by
from fewstep.seeding import Draws, Random

TRIAL = 20  # calls that are timed without graphs, and as many with them
PAYS = 0.97  # the most of the time without graphs that they may take
MOST = 128  # graphs: shapes that never come again would fill the memory
Draw = Callable[..., Tensor]


class Machine(Protocol):
    """What records and times calls."""

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Runs a function once; gives what it gave, and what runs its operations again, on the same memory."""

    def now(self) -> Any:
        """A moment in what the device does."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two moments, which are waited for."""

    def room(self) -> tuple[int, int]:
        """Free bytes, and those that recordings hold."""

    def drop(self) -> None:
        """Frees the memory of recordings that nothing refers to any more."""


class CUDA:
    """Records CUDA graphs, all in one pool of memory: they run one after the other, and share it."""

    def __init__(self, device: torch.device):
        self.device, self.stream, self.held = device, torch.cuda.Stream(device), 0
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        pieces, before = list[Callable[[], object]](), torch.cuda.memory_reserved(self.device)
        with ExitStack() as recording:

            def begin() -> None:
                graph = torch.cuda.CUDAGraph()
                # Of this thread alone: batches are made beside it, whose allocations would end a recording of all.
                mode = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
                recording.enter_context(mode)
                pieces.append(graph.replay)

            def cut(work: Work, tensors: Sequence[Tensor]) -> None:
                recording.close()
                pieces.append(partial(work, [*map(_unowned, tensors)]))
                begin()

            begin()
            with cut_by(cut):
                found = function()
        self.held += torch.cuda.memory_reserved(self.device) - before

        def replay() -> None:
            for piece in pieces:
                piece()

        replay()  # recording ran nothing
        return found, replay

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000  # of milliseconds

    def room(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self.device)[0], self.held

    def drop(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        self.pool, self.held = torch.cuda.graph_pool_handle(), 0


def _unowned(x: Tensor) -> Tensor:
    """The same numbers, in memory that the graphs may use for others before and behind: gradients above all."""
    memory = x.untyped_storage()
    found: Any = torch._C._construct_storage_from_data_pointer(memory.data_ptr(), x.device, memory.nbytes())
    return x.new_empty(0).set_(found, x.storage_offset(), x.shape, x.stride())


@dataclass
class Kind:
    """Calls of one turn and of inputs of one shape."""

    drawn: "list[Drawn] | None" = None
    """The random numbers that such a call asks for, from the first one on; None of a kind that was never called."""
    inputs: Any = None
    outputs: Any = None
    replay: Callable[[], None] | None = None
    eager: list[tuple[Any, Any]] = field(default_factory=list)
    replayed: list[tuple[Any, Any]] = field(default_factory=list)
    """Moments before and behind calls."""


class Graphs:
    """`work(inputs, turn, random)`, by graphs where a trial says that they pay; the same numbers either way.

    The first `trial` calls, and the first of each kind, run as they are; without a trial graphs are taken untimed.
    `settle(False)` brings up to date what the host writes only when it sees a change: before a replay, and at the end
    of a recording. `settle(True)` puts away what a recording left that failed. What was chosen, and why, is said once.
    """

    def __init__(
        self,
        work: Callable[[Any, Any, Any], Any],
        machine: Machine,
        settle: Callable[[bool], None] = lambda failed: None,
        trial: int | None = TRIAL,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ):
        self.work, self.machine, self.settle, self.trial, self.say = work, machine, settle, trial or 0, say
        self.kinds: dict[Hashable, Kind] = {}
        self.calls, self.on, self.decided = 0, True, trial is None

    def __call__(self, inputs: Any, turn: Hashable, random: Random | None = None) -> Any:
        if not self.on:
            return self.work(inputs, turn, random)
        kind = self.kinds.setdefault((turn, _signature(inputs)), Kind())
        self.calls += 1
        if kind.drawn is None and any(isinstance(each, str) for each in _leaves(inputs)):
            why = "texts are embedded in every step (embeddings.max_gb keeps them)"
            return self._without(why, inputs, turn, random)
        if len(self.kinds) > MOST:
            return self._without(f"steps come in more than {MOST} kinds", inputs, turn, random)
        if kind.replay is None:
            if self.calls <= self.trial or kind.drawn is None:
                return self._eager(kind, inputs, turn, random)
            return self._recorded(kind, inputs, turn, random)
        start = self.machine.now()
        found = self._replayed(kind, inputs, random)
        if not self.decided:
            kind.replayed.append((start, self.machine.now()))
            self._decide()
        return found

    def make_room(self) -> None:
        """Drops the graphs where what comes next may need their memory; they are recorded anew."""
        free, held = self.machine.room()
        if self.on and free < held:
            self._forget()

    def _eager(self, kind: Kind, inputs: Any, turn: Hashable, random: Random | None) -> Any:
        self.make_room()  # what a step keeps alive would lie beside the same of the graphs
        start, kind.drawn = self.machine.now(), []
        found = self.work(inputs, turn, random and _Noted(random, kind.drawn))
        if not self.decided:
            kind.eager.append((start, self.machine.now()))
        return found

    def _recorded(self, kind: Kind, inputs: Any, turn: Hashable, random: Random | None) -> Any:
        kind.inputs = _each(torch.clone, inputs)
        self._prepare(kind, random)

        def once() -> Any:
            with _recording():
                found = self.work(kind.inputs, turn, random and _Kept(random, kind.drawn or []))
                self.settle(False)
            return found

        try:
            kind.outputs, kind.replay = self.machine.record(once)
        except RuntimeError as error:  # of memory, of a driver, or of an operation that waits for the device
            why = out_of_memory(error) or f"a step can't be recorded ({brief(error)})"
            return self._without(why, inputs, turn, random)
        return _each(torch.clone, kind.outputs)

    def _replayed(self, kind: Kind, inputs: Any, random: Random | None) -> Any:
        _fill(kind.inputs, inputs)
        self._prepare(kind, random)
        assert kind.replay
        kind.replay()
        return _each(torch.clone, kind.outputs)  # which the next replay writes over

    def _prepare(self, kind: Kind, random: Random | None) -> None:
        self.settle(False)
        for drawn in kind.drawn or []:
            if random:
                drawn.fill(random)

    def _decide(self) -> None:
        """Once all calls of a trial have been replays, which is when the device is waited for."""
        known = [kind for kind in self.kinds.values() if kind.eager and kind.replayed]
        if sum(len(kind.replayed) for kind in self.kinds.values()) < self.trial or not known:
            return
        # The least of each kind: first calls take what no later one does.
        times = [[min(self.machine.seconds(*each) for each in calls) for calls in (k.eager, k.replayed)] for k in known]
        eager, replayed = (sum(each) / len(known) for each in zip(*times, strict=True))
        self.decided = True
        told = f"{replayed:.3g} s a step with them, {eager:.3g} s without"
        if replayed > PAYS * eager:
            self._stop(f"they do not pay here: {told}")
        else:
            self.say(f"graphs: on, {eager / replayed:.2f} times as fast: {told}")

    def _without(self, why: str, inputs: Any, turn: Hashable, random: Random | None) -> Any:
        self._stop(why)
        self.settle(True)
        return self.work(inputs, turn, random)

    def _stop(self, why: str) -> None:
        self.on = False
        self._forget()
        self.kinds = {}
        self.say(f"graphs: off, {why}")

    def _forget(self) -> None:
        for kind in self.kinds.values():
            kind.inputs = kind.outputs = kind.replay = None
        self.machine.drop()


_recordings: list[bool] = []


@contextmanager
def _recording() -> Iterator[None]:
    _recordings.append(True)
    try:
        yield
    finally:
        _recordings.pop()


def never_in_a_graph(what: str) -> None:
    """Ends a recording, and no other call: for what the next call may find elsewhere, or otherwise."""
    if _recordings:
        raise RuntimeError(what)


M = TypeVar("M", bound=nn.Module)


def has_graphs(device: torch.device) -> bool:
    """Whether the device can replay."""
    return device.type == "cuda"


def graphed(module: M, device: torch.device) -> M:
    """A view of a module whose calls without gradient are graphs where they pay; on a CPU the module itself."""
    if not has_graphs(device):
        return module
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    calls = Graphs(lambda inputs, turn, random: module(*inputs), CUDA(device), trial=2, say=lambda line: None)
    view.forward = lambda *given: module(*given) if torch.is_grad_enabled() else calls(given, None)
    return view


# --- random numbers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one purpose, and the tensors that it came in."""

    purpose: str
    generator: Generator
    numbers: list[tuple[Draw, Tensor]] = field(default_factory=list)

    def fill(self, random: Random) -> None:
        """With the numbers of another step."""
        self.generator.manual_seed(random.seed_of(self.purpose))
        for draw, kept in self.numbers:
            draw(kept.shape, generator=self.generator, out=kept)


class _Noted(Random):
    """Draws what a call asks for, and keeps it."""

    def __init__(self, random: Random, drawn: list[Drawn]):
        super().__init__(random.seed, random.step, random.device)
        self.drawn = drawn

    def draws(self, purpose: str, rows: Sequence[int], total: int) -> Draws:
        self.drawn.append(Drawn(purpose, self.generator(purpose)))
        return _NotedDraws(self.drawn[-1], rows, total)


class _NotedDraws(Draws):
    def __init__(self, drawn: Drawn, rows: Sequence[int], total: int):
        super().__init__(drawn.generator, rows, total)
        self.drawn = drawn

    def _whole(self, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        self.drawn.numbers.append((draw, super()._whole(draw, shape)))
        return self.drawn.numbers[-1][1]


class _Kept(Random):
    """Gives what is kept, in order."""

    def __init__(self, random: Random, drawn: list[Drawn]):
        super().__init__(random.seed, random.step, random.device)
        self.left = iter(drawn)

    def draws(self, purpose: str, rows: Sequence[int], total: int) -> Draws:
        drawn = next(self.left, None)
        if drawn is None or drawn.purpose != purpose:
            raise RuntimeError(f"{purpose}: not what a step of this kind draws")
        return _KeptDraws(drawn, rows, total)


class _KeptDraws(Draws):
    def __init__(self, drawn: Drawn, rows: Sequence[int], total: int):
        super().__init__(drawn.generator, rows, total)
        self.left = iter(drawn.numbers)

    def _whole(self, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        _, kept = next(self.left, (draw, None))
        if kept is None or kept.shape != shape:
            raise RuntimeError(f"{shape}: no number of that shape is drawn by a step of this kind")
        return kept


# --- nested tensors --------------------------------------------------------------------------------------------------


def _signature(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, dict):
        return tuple((name, _signature(each)) for name, each in value.items())
    return tuple(map(_signature, value)) if isinstance(value, list | tuple) else value


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _each(function, each) for name, each in value.items()}
    return type(value)(_each(function, each) for each in value) if isinstance(value, list | tuple) else value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


def _fill(kept: Any, given: Any) -> None:
    for ours, theirs in zip(_leaves(kept), _leaves(given), strict=True):
        if isinstance(ours, Tensor):
            ours.copy_(theirs, non_blocking=True)
