"""Low-rank layers written out, for autograd: what ours are compared with."""

import copy

from torch import Tensor, nn
from torch.nn import functional

from fewstep.diffusion.denoiser import Denoiser
from fewstep.networks.lora_layers import lora_of


class WrittenOut(nn.Module):
    """W x + b + alpha / r B (A x) of a layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        own, down, up, scale = (
            self.layer,
            self.layer.lora_A,
            self.layer.lora_B,
            self.layer.alpha / len(self.layer.lora_A),
        )
        if own.weight.ndim == 2:
            return functional.linear(x, own.weight, own.bias) + scale * ((x @ down.T) @ up.T)
        how = {"stride": own.stride, "padding": own.padding}
        inner = functional.conv2d(x, down, **how)
        return functional.conv2d(x, own.weight, own.bias, **how) + scale * functional.conv2d(inner, up)


def written_out(tree: Denoiser) -> Denoiser:
    """A copy of the tree with tensors of its own throughout, whose low-rank layers are written out."""
    copied = copy.deepcopy(tree)
    for name in lora_of(copied.network):
        parent, _, own = name.rpartition(".")
        setattr(copied.network.get_submodule(parent), own, WrittenOut(copied.network.get_submodule(name)))
    return copied
