"""Low-rank changes of weights (LoRA, arXiv 2106.09685): what they are by name, and how they are merged."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The change of one weight: W' = W + strength alpha / r (up down), in float32, whatever they are kept in.

    down is (r, in) or, of a convolution, (r, in, k, k); up (out, r) or (out, r, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r, the inner size of the product."""
        return self.down.shape[0]

    @property
    def shape(self) -> torch.Size:
        """Of the weight that it changes."""
        return torch.Size((self.up.shape[0], *self.down.shape[1:]))

    def delta(self) -> Tensor:
        """alpha / r (up down), float32, in the shape of the weight."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)  # (out, in k k)
        return (self.alpha / self.rank * product).reshape(self.shape)

    def with_alpha(self, alpha: float) -> "LowRank":
        """The same change, with another alpha: what it differs by goes into `up`."""
        return replace(self, up=self.up * (self.alpha / alpha), alpha=alpha)


DOWN, UP = ".lora_A", ".lora_B"  # behind the name of a layer, in a network's state
LoRA = Mapping[str, LowRank]
"""Changes by the dotted names of the modules in the diffusers network, such as `mid_block.resnets.0.conv1`."""


def lora_in(state: Mapping[str, Tensor], alpha: float) -> dict[str, LowRank]:
    """The changes that are trained in a network, by its state: `NAME.lora_A` and `NAME.lora_B` beside `NAME.weight`."""
    names = [name.removesuffix(DOWN) for name in state if name.endswith(DOWN)]
    return {name: LowRank(state[name + DOWN].detach(), state[name + UP].detach(), alpha) for name in names}


def merged(weight: Tensor, change: LowRank, strength: float = 1.0) -> Tensor:
    """The weight with its change, in float32: in bfloat16 half of a small change would be lost."""
    return weight.float() + strength * change.delta().to(weight.device)
