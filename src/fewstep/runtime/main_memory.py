"""Trained weights in main memory, beside those that a device computes with: what is seldom done is done there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.runtime.graphs import never_in_a_graph
from fewstep.runtime.sharding import as_shard, mine

BLOCK = 2**26  # numbers


def beside(tensors: Sequence[Any]) -> list[Any]:
    """Copies in main memory, of shards those of their rows; of a GPU's in memory that copies need no host for.

    They lie in blocks: memory of that kind is had in powers of two, which would be a third more of SDXL's tensors.
    """
    rows: list[Tensor] = [mine(each.detach()) for each in tensors]
    found, left, block = list[Any](), sum(each.numel() for each in rows), torch.empty(0)
    for own, of in zip(rows, tensors, strict=True):
        num = own.numel()
        if num > len(block):
            block = torch.empty(max(num, min(left, BLOCK)), dtype=own.dtype, pin_memory=own.is_cuda)
        found.append(as_shard(block[:num].as_strided(own.shape, own.stride()).copy_(own), of))
        block, left = block[num:], left - num
    return found


class MainMemory:
    """The numbers of some parameters, where an optimizer updates them, and room for their gradients.

    Gradients are on their way (`take`) while the device computes on; the host waits for them where it updates
    (`arrived`), and sends the weights back (`give`). So that a recorded step may take, all lies where it always did.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        self.weights, self.gradients = beside(parameters), beside(parameters)
        self.skipped: Tensor = beside([torch.zeros((), device=parameters[0].device)])[0]
        # An event that a replay records, too, and that the host may wait for.
        self.sent = torch.cuda.Event(external=True) if parameters[0].is_cuda else None

    @torch.no_grad()
    def fetch(self) -> None:
        """Takes the weights as they are on the device."""
        torch._foreach_copy_([*map(mine, self.weights)], [mine(each.detach()) for each in self.parameters])

    @torch.no_grad()
    def take(self, skipped: Tensor) -> None:
        """Has the gradients, and whether the update is to be left out (), sent here."""
        for weight, gradient, parameter in zip(self.weights, self.gradients, self.parameters, strict=True):
            weight.grad = None if parameter.grad is None else gradient  # the same of every step, also of a replay
        pairs = [(w.grad, p.grad) for w, p in zip(self.weights, self.parameters, strict=True) if p.grad is not None]
        ours, theirs = ([mine(each) for each in side] for side in zip(*pairs, strict=True))
        torch._foreach_copy_(ours, theirs, non_blocking=True)
        self.skipped.copy_(skipped, non_blocking=True)
        if self.sent:
            self.sent.record()

    def arrived(self) -> Tensor:
        """Waits for what was taken; gives whether the update is to be left out ()."""
        never_in_a_graph("an update in main memory is none of the device's operations")
        if self.sent:
            self.sent.synchronize()
        return self.skipped

    @torch.no_grad()
    def give(self) -> None:
        """Sends the weights to the device, before what it computes next."""
        torch._foreach_copy_([mine(each.detach()) for each in self.parameters], [*map(mine, self.weights)], True)
