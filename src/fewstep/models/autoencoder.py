"""An autoencoder by itself, while it is trained and in its run folder; inside a pipeline it is the pipeline's own."""

from __future__ import annotations  # diffusers is imported only where an autoencoder is loaded

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.image_model import with_state, write_description
from fewstep.models.loading.files import check_files
from fewstep.models.loading.pipeline import library_class, load_part
from fewstep.networks.codec import Codec, to_images

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


Decode = Callable[[Tensor], Tensor]
"""From latents (B, C, h, w), scaled as a denoiser's x0, to pixels (B, 3, H, W) around [-1, 1], with gradient."""


class Autoencoder:
    """x (B, 3, H, W) in [-1, 1] <-> latents (B, C, h, w)."""

    def __init__(self, vae: AutoencoderKL, image_size: int | None = None):
        self.vae = vae
        self.image_size: int = image_size or vae.config.sample_size
        self.shape: tuple[int, ...] = Codec(vae).shape(self.image_size)
        self.sampling_batch = 250

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        device: torch.device = self.vae.device
        return device

    def to(self, device: torch.device) -> None:
        """Moves the weights."""
        self.vae.to(device)

    def release(self) -> None:
        """Nothing surrounds the weights that are trained."""

    @property
    def latent_space(self) -> dict[str, Any]:
        """What latents on disk must agree in."""
        return Codec(self.vae).latent_space(self.image_size)

    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Latents of uint8 images (B, 3, R, R) by unit noise (B, C, h, w)."""
        return Codec(self.vae).encode(images, noise)

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:
        """uint8 images from the posterior's mean for pixels (B, 3, H, W)."""
        return to_images(self.vae.decode(self.vae.encode(pixels).latent_dist.mode()).sample)

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None, **config: float) -> None:
        """Writes `vae/` as diffusers does, with the weights in `state` and other values in its configuration, and
        `fewstep.json` beside it."""
        carrier, _ = with_state(self.vae, self.vae.state_dict() | dict(state or {}))
        carrier.register_to_config(**config)  # its own, as this puts another in place
        carrier.save_pretrained(folder / "vae")
        write_description(folder, {"family": "autoencoder"})


def load_autoencoder(folder: Path) -> Autoencoder:
    """What `Autoencoder.save` wrote, or a pipeline's folder holds, in evaluation mode; UserError if there is none."""
    if not (folder / "vae").is_dir():
        raise UserError(f"{folder}: holds no autoencoder (vae/)")
    check_files(folder, ["vae"])
    return Autoencoder(load_part(library_class("AutoencoderKL"), folder / "vae").eval())


def load_tiny_decoder(folder: Path, num_channels: int, device: torch.device) -> Decode:
    """The frozen decoder of an AutoencoderTiny (TAESD, TAESDXL); raises UserError if it is none for these latents."""
    try:
        check_files(folder, ["."])
        tiny = load_part(library_class("AutoencoderTiny"), folder)
    except UserError as error:
        raise UserError(f"regression.decoder: {error}") from error
    if (found := tiny.config.latent_channels) != num_channels:
        raise UserError(f"regression.decoder: {folder}: an AutoencoderTiny of {found} channels, not of {num_channels}")
    tiny.eval().requires_grad_(False).to(device)
    return Codec(tiny).decode
