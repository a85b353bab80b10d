"""What the critic is shown: samples, some rows of them, and a pool of fakes that serves a whole cycle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Condition
from fewstep.runtime.distributed import num_ranks, sums
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
    """The student's x0 (K, B, ...) at the timesteps of one rollout, and their condition: the fakes of a whole cycle.

    It holds the whole batch, which may be divided otherwise after a resume, within a cycle or not, always in the same
    tensors: a recorded step finds there what another one wrote.
    """

    def __init__(self, num_timesteps: int, device: torch.device):
        self.num_timesteps, self.device = num_timesteps, device
        self.x0: Tensor
        self.condition: Condition = {}
        self.own: list[slice] = []
        """The rows that this rank has put there since the last state was loaded; it knows no others' then."""

    def put(self, x0s: Sequence[Tensor], condition: Condition, draws: Draws) -> None:
        """The rows of `draws`: x0 (rows, ...) of the first stops, or of all."""
        if not hasattr(self, "x0"):
            self.x0 = x0s[0].new_zeros(self.num_timesteps, draws.total, *x0s[0].shape[1:])
            self.condition = {name: value.new_zeros(draws.total, *value.shape[1:]) for name, value in condition.items()}
        mine = slice(draws.rows[0], draws.rows[0] + len(draws))
        if mine not in self.own:
            self.own.append(mine)
        for stop, x0 in enumerate(x0s):
            self.x0[stop, mine] = x0.detach()
        for name, value in condition.items():
            self.condition[name][mine] = value

    def take(self, stop: int, rows: Sequence[int]) -> tuple[Tensor, Condition]:
        """x0 (rows, ...) at a stop and their condition; rows are some in a row."""
        mine = slice(rows[0], rows[0] + len(rows))
        return self.x0[stop, mine], {name: value[mine] for name, value in self.condition.items()}

    def state_dict(self) -> dict[str, Any]:
        """Of the whole batch, to which each rank adds its rows."""
        if num_ranks() == 1 or not self.own:
            return {"x0": self.x0, "condition": self.condition}
        x0, condition = torch.zeros_like(self.x0), {name: torch.zeros_like(x) for name, x in self.condition.items()}
        for mine in self.own:
            x0[:, mine] = self.x0[:, mine]
            for name, value in self.condition.items():
                condition[name][mine] = value[mine]
        found = sums({"x0": x0} | condition)
        return {"x0": found.pop("x0"), "condition": found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also takes the states of earlier versions, without the stops that no update takes."""
        x0, condition = state["x0"].to(self.device), state["condition"]
        num = x0.shape[1]
        given = {name: value.to(self.device) for name, value in condition.items()}
        self.put(x0, given, Draws(torch.Generator(), range(num), num))
        self.own = []
