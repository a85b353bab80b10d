"""Codecs: from what an autoencoder gives to a denoiser's x0 and back, by all that the autoencoder's files say."""

from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.networks.fingerprint import fingerprint


def to_pixels(images: Tensor) -> Tensor:
    """uint8 images -> floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_images(pixels: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8 images, clipped and rounded."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Codec:
    """x0 = (z - shift) scale; z (B, C, h, w) is a sample of the autoencoder's posterior.

    The files give one shift and scale, or a mean and a deviation per channel beside the scale; UserError for others.
    """

    def __init__(self, vae: Any):
        self.vae = vae
        # anew at every use: a training of the autoencoder measures its scale at the end
        self.shift, self.scale = _shift_and_scale(vae.config)

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """Of one x0 (C, h, w) of a picture of so many pixels; raises UserError where they can't be halved so often."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)  # every level after the first halves the picture
        if image_size % factor:
            raise UserError(f"image_size {image_size}: the autoencoder wants a multiple of {factor}")
        return self.vae.config.latent_channels, image_size // factor, image_size // factor

    def to_z(self, x0: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        z = x0 / _on(self.scale, x0)  # in this order, as diffusers divides
        return z if self.shift is None else z + _on(self.shift, z)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """x0 (B, C, h, w) of uint8 images (B, 3, H, W): mean + std noise, one sample of the posterior (spec, 1.1)."""
        posterior = self.vae.encode(to_pixels(images.to(self.vae.device)).to(self.vae.dtype)).latent_dist
        # in float32 behind the network: bfloat16 would round the sample to two digits
        z: Tensor = posterior.mean.float() + posterior.std.float() * noise.to(self.vae.device)
        return (z if self.shift is None else z - _on(self.shift, z)) * _on(self.scale, z)

    def decode(self, x0: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) around [-1, 1], with gradient."""
        # cast behind the division: x0 of a denoiser is float32, whatever the autoencoder computes in
        pixels: Tensor = self.vae.decode(self.to_z(x0).to(self.vae.dtype), return_dict=False)[0]
        return pixels.float()

    def latent_space(self, image_size: int) -> dict[str, Any]:
        """What latents on disk must agree in: the autoencoder's fingerprint, their shape, the images' size."""
        config = self.vae.config
        further = [config.get(name) for name in ("shift_factor", "latents_mean", "latents_std")]
        facts = [config.scaling_factor, *(further if self.shift is not None else [])]  # as before there were others
        shape = list(self.shape(image_size))
        return {"autoencoder": fingerprint([self.vae], *facts), "shape": shape, "image_size": image_size}


def _shift_and_scale(config: Any) -> tuple[Tensor | float | None, Tensor | float]:
    """Numbers, or (1, C, 1, 1) tensors; a shift of nothing is None."""
    mean, deviation, shift = (config.get(name) for name in ("latents_mean", "latents_std", "shift_factor"))
    if mean is None and deviation is None:
        # floats, for a float32 tensor of them would round otherwise on a GPU
        return shift or None, config.scaling_factor
    if mean is None or deviation is None or len(mean) != len(deviation) or len(mean) != config.latent_channels or shift:
        raise UserError("vae: its latents_mean, latents_std and shift_factor don't fit together")
    # (1, C, 1, 1), as SDXL's pipeline has them: z = x0 deviation / scale + mean
    mean, deviation = (torch.tensor(numbers, dtype=torch.float32)[None, :, None, None] for numbers in (mean, deviation))
    return mean, config.scaling_factor / deviation


def _on(number: Tensor | float, x: Tensor) -> Tensor | float:
    return number.to(x.device) if isinstance(number, Tensor) else number
