"""Exponential moving averages of a module's trainable parameters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.runtime.main_memory import beside
from fewstep.runtime.sharding import put, reshard
from fewstep.runtime.shards import Divided


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """What is trained, by name, detached: all that checkpoints, averages and other runs take of a module."""
    reshard(module)
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def load_trainable(module: nn.Module, state: Mapping[str, Tensor | Divided]) -> None:
    """Puts back what `trainable_state` gave; raises KeyError or RuntimeError if it is of another module."""
    ours = trainable_state(module)
    if other := ours.keys() ^ state.keys():
        raise KeyError(f"{sorted(other)[0]}, one of {len(other)} parameters on one side alone")
    for name, parameter in ours.items():
        put(parameter, state[name])


class EMA:
    """average <- d average + (1 - d) parameter, with d = min(decay, (1 + n) / (10 + n)) at update n, for every decay.

    The ramp lets an average follow the first updates, when there is little to average. Of several decays the first is
    meant where none is named; `others` are the names of the rest. Each takes the memory of the parameters, but for
    decay 0, which keeps no history: its average is the parameters themselves.
    """

    def __init__(self, module: nn.Module, decay: float | Sequence[float]):
        decays = list(decay) if isinstance(decay, Sequence) else [decay]
        self.num_updates, self.module = 0, module
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.first, *self.others = [ema_name(each) for each in decays]
        self.decays = {ema_name(each): each for each in decays if each}
        self.copies = {name: [p.detach().clone() for p in self.parameters.values()] for name in self.decays}
        self.averaged: list[Tensor] = list(self.parameters.values())

    def move(self, weights: Sequence[Tensor]) -> None:
        """Keeps averages in main memory from now on, where the same `weights` lie, and takes in those."""
        self.averaged = list(weights)
        self.copies = {name: beside(copies) for name, copies in self.copies.items()}

    def averages_of(self, name: str | None = None) -> dict[str, Tensor]:
        """The first averages, or those of `name`, by the parameters' names; not to be asked for inside `applied`."""
        averages = self.copies.get(name or self.first, [p.detach() for p in self.parameters.values()])
        return dict(zip(self.parameters, averages, strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the parameters as they are now."""
        ramp = (1 + self.num_updates) / (10 + self.num_updates)
        for name, decay in self.decays.items():
            torch._foreach_lerp_(self.copies[name], self.averaged, 1 - min(decay, ramp))
        self.num_updates += 1

    @contextmanager
    def applied(self, name: str | None = None) -> Iterator[None]:
        """The module carries the first averages, or those of `name`, in this context, and its own parameters behind.

        The values change places, tensor by tensor: that takes no third copy, and also holds where a parameter is a
        shard, whose `.data` can't be exchanged.
        """
        parameters, copies = self.parameters.values(), self.copies.get(name or self.first, [])  # none of decay 0
        swapped: list[tuple[Tensor, Tensor]] = []
        reshard(self.module)
        try:
            for parameter, average in zip(parameters, copies, strict=False):
                _swap(parameter, average)
                swapped.append((parameter, average))
            yield
        finally:
            reshard(self.module)
            for pair in swapped:
                _swap(*pair)

    def averages_in(
        self, state: dict[str, Any], weights: dict[str, Tensor], name: str | None = None
    ) -> dict[str, Tensor]:
        """What `averages_of` gives, of a state, by the names of the weights beside it."""
        averages = state["others"][name] if name else state["averages"]
        return dict(zip(weights, averages, strict=True)) if averages else weights

    def state_dict(self) -> dict[str, Any]:
        others = {name: self.copies.get(name, []) for name in self.others}
        state = {"averages": self.copies.get(self.first, []), "num_updates": self.num_updates}
        return state | ({"others": others} if others else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also takes the states of earlier versions, which held a copy for decay 0."""
        saved = {self.first: state["averages"], **state.get("others", {})}
        for name, averages in self.copies.items():
            for average, value in zip(averages, saved[name], strict=True):
                put(average, value)
        self.num_updates = state["num_updates"]


@torch.no_grad()
def _swap(parameter: Tensor, average: Tensor) -> None:
    own = parameter.clone()
    parameter.copy_(average)
    average.copy_(own)


def ema_name(decay: float) -> str:
    """What an average is called in files and metrics: 0.99995."""
    return f"{decay:.15g}"
