"""Exponential moving average of a module's trainable parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """average <- d average + (1 - d) parameter, with d = min(decay, (1 + n) / (10 + n)) at update n.

    The ramp lets the average follow the first updates, when there is little to average. `decay` 0 keeps no history.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.num_updates = 0
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the parameters as they are now."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
        self.num_updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module carries the averages inside this context, and its own parameters again behind it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.data, average.data = average.data, parameter.data

    def state_dict(self) -> dict[str, object]:
        return {"averages": self.averages, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict) -> None:
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)
        self.num_updates = state["num_updates"]
