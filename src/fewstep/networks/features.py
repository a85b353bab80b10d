"""Features of a named layer, with or without running the rest of the network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.schedules import broadcast


@contextmanager
def _captured(layer: nn.Module, detach_rest: bool = False) -> Iterator[list[Any]]:
    """Collects the layer's output; may run what follows without a graph."""
    captured: list[Any] = []

    # The hook is gone before any backward pass, so a recomputation of the layer neither collects nor detaches again.
    def hook(module: nn.Module, args: tuple[object, ...], output: Any) -> None:
        captured.append(output)
        if detach_rest:
            torch.set_grad_enabled(False)

    handle = layer.register_forward_hook(hook)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # puts back what `detach_rest` switched off
            yield captured
    finally:
        handle.remove()


def encoder(network: nn.Module, layer: str) -> nn.Module:
    """A view of the network that ends behind `layer`, on the same weights; its output is nothing to use.

    Of a UNet's down blocks and its middle, as `unet.down_blocks.2` or what is inside it; where the layer is none of
    these the view is the whole network. Leaving a pass by an exception instead would leave sharded modules half-way.
    """
    part, *path = layer.split(".")
    unet = network.get_submodule(part)
    if path[:1] not in (["down_blocks"], ["mid_block"]) or not hasattr(unet, "up_blocks"):
        return network
    tail: dict[str, nn.Module | None] = {name: nn.Identity() for name in ("conv_norm_out", "conv_act", "conv_out")}
    tail["up_blocks"] = nn.ModuleList()
    if path[0] == "down_blocks":
        blocks = unet.get_submodule("down_blocks")
        assert isinstance(blocks, nn.ModuleList)
        tail |= {"mid_block": None, "down_blocks": blocks[: int(path[1]) + 1]}
    return _with_children(network, {part: _with_children(unet, tail)})


def _with_children(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    """The module with other children; weights, hooks and all else are shared, and nothing is constructed anew."""
    view: nn.Module = object.__new__(type(module))
    view.__dict__.update(module.__dict__, _modules={**module._modules, **children})
    return view


def features(denoiser: Denoiser, layer: str, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The output (B, C, H, W) of `layer` of the network (a dotted name); what lies behind it is not run.

    Raises AttributeError if there is no such layer, IndexError if the forward pass does not call it.
    """
    with _captured(denoiser.network.get_submodule(layer)) as captured:
        c_in = broadcast(denoiser.coefficients(t)[2], x_t)  # (B, 1, 1, 1)
        denoiser.run(encoder(denoiser.network, layer), c_in * x_t, t, condition)
    return _map(denoiser, captured[0], x_t)


def x0_and_features(
    denoiser: Denoiser, layer: str, x_t: Tensor, t: Tensor, condition: Condition, features_only_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """The x0 prediction and the output of `layer` from one pass.

    With `features_only_grad` no graph is built behind the layer: x0 is a constant, as the distribution-matching
    loss needs it, and the decoder's activations are never kept.
    """
    with _captured(denoiser.network.get_submodule(layer), detach_rest=features_only_grad) as captured:
        x0 = denoiser(x_t, t, condition)
    return x0, _map(denoiser, captured[0], x_t)


def _map(denoiser: Denoiser, output: Any, x_t: Tensor) -> Tensor:
    """The picture in what a layer gives, which its adapter knows: beside it are skips, or text."""
    adapter: Any = denoiser.network
    features: Tensor = adapter.feature_map(output, x_t)
    return features  # (B, C, H, W)
