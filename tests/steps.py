"""A batch in one piece, and its random numbers, as the tests of training methods need them."""

import torch

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
