"""Exponential moving averages of a module's trainable parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """average <- d average + (1 - d) parameter, with d = min(decay, (1 + n) / (10 + n)) at update n, for every decay.

    The ramp lets an average follow the first updates, when there is little to average. `decay` 0 keeps no history. Of
    several decays the first is meant where none is named; `others` holds the averages of the rest by their names. Each
    takes the memory of the parameters.
    """

    def __init__(self, module: nn.Module, decay: float | Sequence[float]):
        self.decays = list(decay) if isinstance(decay, Sequence) else [decay]
        self.num_updates = 0
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.averages = self._copies()
        self.others = {ema_name(each): self._copies() for each in self.decays[1:]}

    def _copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the parameters as they are now."""
        ramp = (1 + self.num_updates) / (10 + self.num_updates)
        parameters = [p.detach() for p in self.parameters]
        for decay, averages in zip(self.decays, (self.averages, *self.others.values()), strict=True):
            torch._foreach_lerp_(averages, parameters, 1 - min(decay, ramp))
        self.num_updates += 1

    @contextmanager
    def applied(self, name: str | None = None) -> Iterator[None]:
        """The module carries the first averages, or those of `name`, in this context, and its own parameters behind."""
        averages = self.averages if name is None else self.others[name]
        self._exchange(averages)
        try:
            yield
        finally:
            self._exchange(averages)

    def _exchange(self, averages: list[Tensor]) -> None:
        for parameter, average in zip(self.parameters, averages, strict=True):
            parameter.data, average.data = average.data, parameter.data

    def state_dict(self) -> dict[str, object]:
        others = {"others": self.others} if self.others else {}
        return {"averages": self.averages, "num_updates": self.num_updates, **others}

    def load_state_dict(self, state: dict) -> None:
        others = [(averages, state["others"][name]) for name, averages in self.others.items()]
        for averages, saved in [(self.averages, state["averages"]), *others]:
            for average, value in zip(averages, saved, strict=True):
                average.copy_(value)
        self.num_updates = state["num_updates"]


def ema_name(decay: float) -> str:
    """What an average is called in files and metrics: 0.99995."""
    return f"{decay:.15g}"
