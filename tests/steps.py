"""What the tests of training methods and of their runs share: batches, random numbers, states, an interrupt."""

import os
import signal
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.seeding import Draws


def whole(batch: dict, num: int) -> list[tuple[range, dict]]:
    """What a step takes: all `num` rows in one part."""
    return [(range(num), batch)]


def in_parts(batch: dict, num: int, parts: int) -> list[tuple[range, dict]]:
    """The same batch in equal parts."""
    rows = [range(first, first + num // parts) for first in range(0, num, num // parts)]
    return [(each, _rows(batch, each)) for each in rows]


def _rows(batch, rows: range):
    if isinstance(batch, dict):
        return {name: _rows(value, rows) for name, value in batch.items()}
    return batch[rows.start : rows.stop]


def draws(num: int, seed: int = 0) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), range(num), num)


def flat(state: object) -> list[Tensor]:
    """Every tensor of a nested state."""
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for value in values for tensor in flat(value)]


def quiet(step: int, metrics: dict[str, float]) -> None:
    """In place of the progress bar."""


def interrupt_at(stop: int) -> Callable[[int, dict[str, float]], None]:
    """A report that presses Ctrl-C behind this step."""
    return lambda step, metrics: os.kill(os.getpid(), signal.SIGINT) if step == stop else None


def dying(after: int, error: BaseException) -> Callable[..., None]:
    """Raises the error at its call number `after`."""
    calls = iter(range(after))

    def tick(*arguments: object) -> None:
        if next(calls, None) is None:
            raise error

    return tick


def spy(patch: pytest.MonkeyPatch, owner: object, name: str, note: Callable[..., object]) -> None:
    """Has `note` called with what a function is called with, before it."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *given, **named: (note(*given, **named), original(*given, **named))[1])
