"""Features of a named layer, by forward hook, with or without running the rest of the network."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser


class _LeaveForward(Exception):
    """Raised in a hook once the features are there; never leaves this file."""


def _tensor(output: Tensor | tuple) -> Tensor:
    """A down block returns (hidden states, skips): the features are the hidden states."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _captured(layer: nn.Module, leave: bool = False, detach_rest: bool = False) -> Iterator[list[Tensor]]:
    """Collects the layer's output; may leave the forward pass there, or run what follows without a graph."""
    captured: list[Tensor] = []

    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        captured.append(_tensor(output))
        if leave:
            raise _LeaveForward
        if detach_rest:
            torch.set_grad_enabled(False)

    handle = layer.register_forward_hook(hook)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # puts back what `detach_rest` switched off
            yield captured
    except _LeaveForward:
        pass
    finally:
        handle.remove()


def features(denoiser: Denoiser, layer: str, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The output of `layer` of the network (a dotted name), leaving the forward pass there.

    Raises AttributeError if there is no such layer, IndexError if the forward pass does not call it.
    """
    with _captured(denoiser.network.get_submodule(layer), leave=True) as captured:
        denoiser(x_t, t, condition)
    return captured[0]


def x0_and_features(
    denoiser: Denoiser, layer: str, x_t: Tensor, t: Tensor, condition: Condition, features_only_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """The x0 prediction and the output of `layer` from one pass.

    With `features_only_grad` no graph is built behind the layer: x0 is a constant, as the distribution-matching
    loss needs it, and the decoder's activations are never kept.
    """
    with _captured(denoiser.network.get_submodule(layer), detach_rest=features_only_grad) as captured:
        x0 = denoiser(x_t, t, condition)
    return x0, captured[0]
