"""What the critic is shown: samples, some rows of them, and a pool of fakes that serves a whole cycle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Condition
from fewstep.seeding import Draws


@dataclass
class Samples:
    """Constants that a pass of the critic is shown, all of them (B, ...), with the draws of their rows."""

    draws: Draws
    x0: Tensor
    condition: Condition


def rows_of(x: Any, rows: Sequence[int]) -> Any:
    """These rows, in order, of a tensor, a list, or a batch of them; of None None."""
    if isinstance(x, dict):
        return {name: rows_of(value, rows) for name, value in x.items()}
    if x is None or len(x) == len(rows):
        return x
    found = [x[row] for row in rows]  # not by an index tensor, whose way to a GPU the host would wait for
    return torch.stack(found) if isinstance(x, Tensor) else found


class Pool:
    """The student's x0 at the timesteps of one rollout, and what they are of: the fakes of all updates of a cycle.

    Update k of the critic takes stop (first + k) mod K, so that K updates in a row see every timestep once. It holds
    the whole batch, which may be divided otherwise after a resume, within a cycle or not.
    """

    def __init__(self, device: torch.device):
        self.device, self.first = device, 0
        self.parts: list[tuple[Tensor, Condition]] = []
        """x0 (K, B, C, H, W) and its condition (B, ...), of one part of the batch after the other."""

    def begin(self, first: int) -> None:
        """A new cycle, whose first stop is `first`."""
        self.first, self.parts = first, []

    def add(self, x0s: Sequence[Tensor], condition: Condition) -> None:
        """The next part of the batch: x0 (B, ...) by stop."""
        self.parts.append((torch.stack([x0.detach() for x0 in x0s]), condition))

    def take(self, update: int, rows: Sequence[int], num_timesteps: int) -> tuple[Tensor, Condition, int]:
        """x0 (rows, ...) of the cycle's critic update, their condition, and their stop; rows are some in a row."""
        x0, condition = self._whole()
        stop = (self.first + update) % num_timesteps
        mine = slice(rows[0], rows[0] + len(rows))
        return x0[stop, mine], {name: value[mine] for name, value in condition.items()}, stop

    def state_dict(self) -> dict[str, Any]:
        """In one piece, however many parts there were."""
        x0, condition = self._whole()
        return {"first": self.first, "x0": x0, "condition": condition}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin(state["first"])
        condition = {name: value.to(self.device) for name, value in state["condition"].items()}
        self.parts = [(state["x0"].to(self.device), condition)]

    def _whole(self) -> tuple[Tensor, Condition]:
        x0s, conditions = zip(*self.parts, strict=True)
        if len(x0s) == 1:
            return x0s[0], conditions[0]
        merged = torch.cat(x0s, 1), {name: torch.cat([each[name] for each in conditions]) for name in conditions[0]}
        self.parts = [merged]
        return merged
