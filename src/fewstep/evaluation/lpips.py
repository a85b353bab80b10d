"""LPIPS, the perceptual distance of two pictures (arXiv 1801.03924), from a TorchScript file or the `lpips` package."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fewstep.errors import UserError
from fewstep.networks.codec import to_pixels

PACKAGE = "lpips"
MAX_VALUES = 2**22  # of the pairs of pictures that are compared at once, 16 MB in floats
Distance = Callable[[Tensor, Tensor], Tensor]
"""From two batches of pixels (B, C, H, W) around [-1, 1] to (B,), with gradient."""
TRAINING = "regression.lpips", "set regression.lpips_size, to 224 say, for small pictures"
JUDGING = "--lpips (in a recipe evaluation.lpips)", "leave it out for pictures so small"


def load_lpips(source: str, size: int | None, device: torch.device, channels: int, image_size: int) -> Distance:
    """The distance of a TorchScript file, or of the package `lpips` with VGG; pictures are resized to `size`, if any.

    Raises UserError if there is no such file or package, or if it does not take pictures of that size.
    """
    return _open(source, size, device, torch.zeros(2, channels, image_size, image_size, device=device), TRAINING)


def pair_distance(source: str, device: torch.device, channels: int, size: int) -> Callable[[Tensor], Tensor]:
    """From R uint8 images (R, C, size, size) to the LPIPS of their pairs (R (R - 1) / 2,) on the CPU, without gradient.

    In the order (0, 1), (0, 2), ..., (1, 2), ...: that of `torch.pdist`. Raises UserError as `load_lpips` does.
    """
    distance = _open(source, None, device, torch.zeros(2, channels, size, size, device=device), JUDGING)

    @torch.no_grad()
    def of_pairs(images: Tensor) -> Tensor:
        pixels = to_pixels(images.to(device))
        pairs = torch.combinations(torch.arange(len(images), device=device))  # (P, 2)
        parts = pairs.split(max(1, MAX_VALUES // images[0].numel()))
        return torch.cat([distance(pixels[part[:, 0]], pixels[part[:, 1]]) for part in parts]).float().cpu()

    return of_pairs


def _open(source: str, size: int | None, device: torch.device, pixels: Tensor, texts: tuple[str, str]) -> Distance:
    """The distance, tried on these black pixels (B, C, H, W)."""
    setting, advice = texts
    network = _network(source, setting).eval().to(device)
    for parameter in network.parameters():  # a ScriptModule has no requires_grad_
        parameter.requires_grad_(False)

    def distance(first: Tensor, second: Tensor) -> Tensor:
        both = (pixels.float().expand(-1, 3, -1, -1) for pixels in (first, second))
        resized = (interpolate(x, (size, size), mode="bilinear") if size else x for x in both)
        found: Tensor = network(*resized)
        return found.flatten(1).mean(1) if source == PACKAGE else found

    _check(distance, source, pixels, setting, advice)
    return distance


def _network(source: str, setting: str) -> Any:
    try:
        if source != PACKAGE:
            return torch.jit.load(source, map_location="cpu")
        import lpips
    except ImportError as error:
        what = "the package lpips is not installed (pip install lpips); or name a TorchScript file"
        raise UserError(f"{setting}: {what}") from error
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{setting}: {source}: not a readable TorchScript file, nor `{PACKAGE}`") from error
    return lpips.LPIPS(net="vgg", verbose=False)


def _check(distance: Distance, source: str, pixels: Tensor, setting: str, advice: str) -> None:
    """Raises UserError unless it gives one finite number per picture."""
    try:
        with torch.no_grad():
            found = distance(pixels, pixels)
    except (RuntimeError, torch.jit.Error) as error:  # the second is of a script's assertions
        what = f"does not take two batches of pictures of {pixels.shape[-1]} pixels"
        raise UserError(f"{setting}: {source}: {what}; {advice}") from error
    what = f"{tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    if not isinstance(found, Tensor) or found.shape != pixels.shape[:1]:
        raise UserError(f"{setting}: {source}: must give one number per picture, not {what}")
    if not found.isfinite().all():
        raise UserError(f"{setting}: {source}: gives NaN or infinity for pictures that are the same")
