"""Randomness as a function of (seed, purpose, step), so that resuming is exact and parts of a batch need not talk."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Generator, Tensor


def generator(seed: int, purpose: str, step: int = 0, device: torch.device | str = "cpu") -> Generator:
    """A generator for one purpose at one step."""
    return Generator(device).manual_seed(seed_of(seed, purpose, step))


def seed_of(seed: int, purpose: str, step: int) -> int:
    """What `generator` is seeded with."""
    # Not hash(), which differs from process to process; the 0 stands where a rank once did.
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}/0".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Random:
    """Where the random numbers of one step come from: a function of seed, purpose and step."""

    def __init__(self, seed: int, step: int, device: torch.device | str):
        self.seed, self.step, self.device = seed, step, device

    def generator(self, purpose: str) -> Generator:
        """A generator for one purpose."""
        return generator(self.seed, purpose, self.step, self.device)

    def seed_of(self, purpose: str) -> int:
        """What that generator is seeded with."""
        return seed_of(self.seed, purpose, self.step)

    def draws(self, purpose: str, rows: Sequence[int], total: int) -> "Draws":
        """Those of some rows of the batch, for one purpose."""
        return Draws(self.generator(purpose), rows, total)


class Draws:
    """The random numbers of a batch of `total` samples, of which `rows` are kept.

    Whoever computes some rows of a batch draws the numbers of all of it and keeps its own, so that a sample's numbers
    do not depend on how the batch is divided. Rows are a range, or some of one in order.
    """

    def __init__(self, generator: Generator, rows: Sequence[int], total: int):
        self.generator, self.rows, self.total, self.device = generator, rows, total, generator.device

    def __len__(self) -> int:
        return len(self.rows)

    def randn(self, *shape: int, before: tuple[int, ...] = ()) -> Tensor:
        """Unit noise (*before, rows, *shape)."""
        return self._mine(torch.randn, before, shape)

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), (rows, *shape)."""
        return self._mine(torch.rand, (), shape)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform integers low .. high-1, (rows, *shape) int64."""
        return self._mine(partial(torch.randint, low, high), (), shape)

    def _whole(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        return draw(shape, generator=self.generator, device=self.device)

    def _mine(self, draw: Callable[..., Tensor], before: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        whole = self._whole(draw, (*before, self.total, *shape))
        if len(self.rows) == self.total:
            return whole
        if isinstance(self.rows, range):
            # a view would keep all of it alive
            return whole.narrow(len(before), self.rows.start, len(self.rows)).clone()
        mine = whole.unbind(len(before))  # not by an index tensor, whose way to a GPU the host would wait for
        return torch.stack([mine[row] for row in self.rows], len(before))
