"""An autoencoder by itself, while it is trained and in its run folder; inside a pipeline it is the pipeline's own."""

from __future__ import annotations  # diffusers is imported only where an autoencoder is loaded

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.networks.image_model import to_images, write_description

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Autoencoder:
    """x (B, 3, H, W) in [-1, 1] <-> latents (B, C, h, w)."""

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        size = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
        self.shape: tuple[int, ...] = (vae.config.latent_channels, size, size)
        self.image_size: int = vae.config.sample_size

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.vae.parameters()).device

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:
        """uint8 images from the posterior's mean for pixels (B, 3, H, W)."""
        return to_images(self.vae.decode(self.vae.encode(pixels).latent_dist.mode()).sample)

    def save(self, folder: Path) -> None:
        """Writes `vae/` as diffusers does, and `fewstep.json` beside it."""
        self.vae.save_pretrained(folder / "vae")
        write_description(folder, {"family": "autoencoder"})


def load_autoencoder(folder: Path) -> Autoencoder:
    """What `Autoencoder.save` wrote, in evaluation mode, or the autoencoder of a diffusers pipeline folder.

    Raises UserError if it is not there, or is damaged.
    """
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: holds no readable autoencoder (vae/)") from error
    return Autoencoder(vae.eval())
