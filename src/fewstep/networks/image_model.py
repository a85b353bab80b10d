"""What the floors above ask of an image model: a denoiser with what surrounds it."""

from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.networks.conditioning import ClassLabels


class ImageModel(Protocol):
    """A teacher or a student of one family (pixel models now, latent ones later) with its conditioner and codec."""

    denoiser: Denoiser
    conditioner: ClassLabels
    shape: tuple[int, ...]
    """Of one x0, without the batch."""
    timesteps: list[float] | None
    """Of a few-step student; None for a teacher."""

    @property
    def bottleneck(self) -> str:
        """Dotted name of the layer that the discriminator reads by default."""

    @property
    def time_embedding(self) -> str:
        """Dotted name of the layer that embeds native time."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""

    def balanced_condition(self, num: int) -> Condition:
        """`num` conditions for evaluation and grids, evenly spread."""

    def encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Condition]:
        """x0 and condition of a batch of real data, on the model's device."""

    def decode(self, x0: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) of x0: for consumers of images, never in a training step."""

    def student(self, denoiser: Denoiser, timesteps: Tensor) -> Self:
        """The same image model around a few-step student."""

    def save(self, folder: Path) -> None:
        """Writes what `pretrained.load` reads."""
