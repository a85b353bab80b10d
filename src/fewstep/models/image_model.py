"""What the floors above ask of an image model: a denoiser with what surrounds it."""

import copy
import json
import math
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Generator, Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.networks.fingerprint import fingerprint

DESCRIPTION = "fewstep.json"
NUMBERS_PER_BATCH = 2**18


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """What fewstep needs to know of a model folder beside what diffusers keeps there."""
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def to_pixels(images: Tensor) -> Tensor:
    """uint8 images -> floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_images(pixels: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8 images, clipped and rounded."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class ImageModel(Protocol):
    """A teacher or a student of one family, pixel or latent; what has a body here is the same in both."""

    denoiser: Denoiser
    unet: nn.Module
    """The diffusers network in the denoiser's adapter."""
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
        return "unet.time_embedding"

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.denoiser.parameters()).device

    @property
    def null_condition(self) -> Condition | None:
        """(1, ...) tensors for guidance, on the model's device; None where the model can't be guided."""

    def draw_condition(self, given: Condition, num: int, draws: Generator) -> Condition:
        """What `num` fakes are drawn for: random classes, or the prompts or captions given."""

    def drop_condition(self, condition: Condition, probability: float, draws: Generator) -> Condition:
        """The condition with this share of the samples replaced by the null condition."""

    def to(self, device: torch.device) -> None:
        """Moves the denoiser to `device`; what surrounds it follows when it is used."""
        self.denoiser.to(device)

    def encode_in(self, dtype: torch.dtype) -> None:
        """Text and images are encoded and decoded in `dtype` from now on; call it before `to`.

        What `save` writes stays as it was loaded. A pixel model has no encoders.
        """
        return

    @property
    def fingerprint(self) -> str:
        """A hash of what its samples are a function of: network, schedule and parameterization."""
        denoiser = self.denoiser
        levels = denoiser.schedule.levels[::111]
        numbers = torch.stack([levels.double().cpu(), *(c.cpu() for c in denoiser.coefficients(levels))])
        rounded = [f"{number:.5g}" for number in numbers.flatten().tolist()]  # in which all machines agree
        return fingerprint([self.unet], type(denoiser.schedule).__name__, rounded)

    @property
    def sampling_batch(self) -> int:
        """How many images are drawn at once: 16 of SD, 4 of SDXL, at most 250."""
        return min(250, max(1, NUMBERS_PER_BATCH // math.prod(self.shape)))

    def release(self) -> None:
        """Sends what surrounds the denoiser back to the CPU, until it is used again."""
        return

    def numbered_condition(self, first: int, last: int) -> Condition:
        """The conditions of images number first .. last-1 of an evaluation or a grid: classes or prompts in turn."""

    def encode_condition(self, batch: dict[str, Any]) -> Condition:
        """The condition of a batch of real data, on the model's device."""

    def encode_x0(self, batch: dict[str, Any], draws: Generator) -> Tensor:
        """x0 of a batch of real data, on the model's device; an autoencoder that draws its latents uses `draws`."""

    def decode(self, x0: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) of x0: for consumers of images, never in a training step."""

    def decode_pixels(self, x0: Tensor) -> Tensor:
        """Pixels (B, C, H, W) around [-1, 1] of x0, with gradient: for losses on pictures."""

    def student(self, denoiser: Denoiser, timesteps: Tensor) -> Self:
        """The same image model around a few-step student."""
        model = copy.copy(self)
        model.denoiser, model.unet, model.timesteps = (
            denoiser,
            denoiser.network.get_submodule("unet"),
            timesteps.tolist(),
        )
        return model

    def save(self, folder: Path) -> None:
        """Writes what `pretrained.load` reads."""
