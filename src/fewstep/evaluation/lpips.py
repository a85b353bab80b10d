"""LPIPS, the perceptual distance of two pictures (arXiv 1801.03924), from a TorchScript file or the `lpips` package."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fewstep.errors import UserError

PACKAGE = "lpips"
Distance = Callable[[Tensor, Tensor], Tensor]
"""From two batches of pixels (B, C, H, W) around [-1, 1] to (B,), with gradient."""


def load_lpips(source: str, size: int | None, device: torch.device, channels: int, image_size: int) -> Distance:
    """The distance of a TorchScript file, or of the package `lpips` with VGG; pictures are resized to `size`, if any.

    Raises UserError if there is no such file or package, or if it does not take pictures of that size.
    """
    network = _network(source).eval().to(device)
    for parameter in network.parameters():  # a ScriptModule has no requires_grad_
        parameter.requires_grad_(False)

    def distance(first: Tensor, second: Tensor) -> Tensor:
        both = (pixels.float().expand(-1, 3, -1, -1) for pixels in (first, second))
        resized = (interpolate(x, (size, size), mode="bilinear") if size else x for x in both)
        found: Tensor = network(*resized)
        return found.flatten(1).mean(1) if source == PACKAGE else found

    _check(distance, source, torch.zeros(2, channels, image_size, image_size, device=device))
    return distance


def _network(source: str) -> Any:
    try:
        if source != PACKAGE:
            return torch.jit.load(source, map_location="cpu")
        import lpips
    except ImportError as error:
        what = "the package lpips is not installed (pip install lpips); or name a TorchScript file"
        raise UserError(f"regression.lpips: {what}") from error
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"regression.lpips: {source}: not a readable TorchScript file, nor `{PACKAGE}`") from error
    return lpips.LPIPS(net="vgg", verbose=False)


def _check(distance: Distance, source: str, pixels: Tensor) -> None:
    """Raises UserError unless it gives one number per picture."""
    try:
        with torch.no_grad():
            found = distance(pixels, pixels)
    except RuntimeError as error:
        what = f"does not take two batches of pictures of {pixels.shape[-1]} pixels"
        advice = "set regression.lpips_size, to 224 say, for small pictures"
        raise UserError(f"regression.lpips: {source}: {what}; {advice}") from error
    if found.shape != pixels.shape[:1]:
        raise UserError(f"regression.lpips: {source}: must give one number per picture, not {tuple(found.shape)}")
