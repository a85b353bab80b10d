"""A CPU that records what it does: operations on the same memory, run again without the Python around them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fewstep.runtime.between import Work, cut_by


class Recorder(TorchDispatchMode):
    """Keeps every operation with the very tensors that it took and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = {each.untyped_storage()._cdata for each in tensors((args, kwargs))}
        made = tensors(found)
        fresh = [each for each in made if each.untyped_storage()._cdata not in given]
        if func._schema.is_mutable or fresh:  # a view goes on showing what lies there
            assert not fresh or len(fresh) == len(made)
            self.operations.append((func, args, kwargs, fresh))
        return found

    def cut(self, work: Work, given: Sequence[Tensor]) -> None:
        with _disable_current_modes():
            work(given)
        self.operations.append((work, (given,), {}, []))

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, kept in self.operations:
            found = func(*args, **kwargs)
            for ours, new in zip(kept, tensors(found), strict=False):
                ours.copy_(new)


def tensors(value: Any) -> list[Tensor]:
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]


class CPU:
    """In place of `graphs.CUDA`; its clock is what `seconds_of` says of the calls between two looks at it."""

    def __init__(self, free: int = 100) -> None:
        self.recorded, self.dropped, self.clock, self.replays, self.free = 0, 0, 0.0, 0, free
        self.fails: Exception | None = None
        self.of_eager, self.of_replay = 1.0, 0.25
        self.pending = 0.0

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if self.fails:
            raise self.fails
        with Recorder() as recorder, cut_by(recorder.cut):
            found = function()
        self.recorded += 1

        def replay() -> None:
            recorder.replay()
            self.replays += 1

        return found, replay

    def now(self) -> tuple[int, int]:
        self.clock += 1
        return self.clock, self.replays

    def seconds(self, start: tuple[int, int], end: tuple[int, int]) -> float:
        return self.of_replay if end[1] > start[1] else self.of_eager

    def room(self) -> tuple[int, int]:
        return self.free, 10 * self.recorded

    def drop(self) -> None:
        self.dropped += 1
