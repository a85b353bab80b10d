"""The distance between a student's first x0 and the end of its teacher's ODE from the same noise."""

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.sampling import rollout
from fewstep.networks.autoencoder import Decode
from fewstep.networks.image_model import ImageModel
from fewstep.networks.lpips import Distance
from fewstep.settings import Settings
from fewstep.training.method import Batch


class RegressionSettings(Settings):
    """Pairs of a teacher's noise and image, and how a student's image is compared with the teacher's."""

    pairs: str
    """The folder that `fewstep data pairs` wrote."""
    sampler: str
    """What the pairs must have been drawn by, as `fewstep data pairs --sampler` has it; SDXL: euler:50@8."""
    lpips: str | None = None
    """LPIPS: a TorchScript file, or `lpips` for the package of that name (VGG, as published); by default the mean
    squared error of latents, or of pixels where the model has no latents."""
    lpips_size: int | None = Field(None, ge=16)
    """Pixels that pictures are resized to for LPIPS; the original DMD has 224 for images of 32 and 64."""
    decoder: str | None = None
    """A folder of diffusers' AutoencoderTiny that decodes latents for LPIPS; by default the model's own autoencoder,
    which takes far more memory."""

    @model_validator(mode="after")
    def _decoded_for_lpips(self) -> Self:
        if not self.lpips and (self.decoder or self.lpips_size):
            raise ValueError("decoder and lpips_size are for lpips, which is not set")
        return self


class PairLoss:
    """mean over the batch of LPIPS(decode(x0), decode(target)), or of mean (x0 - target)^2 without `lpips`.

    x0 is the student's at its first timestep, from the pair's own noise (spec, 1.7; DMD, arXiv 2311.18828, equation 9).
    """

    def __init__(self, model: ImageModel, lpips: Distance | None = None, decode: Decode | None = None):
        self.model, self.lpips, self.decode = model, lpips, decode or model.decode_pixels

    def __call__(self, student: Denoiser, timesteps: Tensor, batch: Batch) -> Tensor:
        """The loss of {"noise", "x0": (B, C, H, W), ...} with what `encode_condition` takes; timesteps (K,)."""
        noise, target = (batch[name].to(self.model.device).float() for name in ("noise", "x0"))
        condition = self.model.encode_condition(batch)
        x0 = rollout(student, noise[None], timesteps, condition, stop=0, grad=True)
        if self.lpips is None:
            return (x0 - target).square().mean()
        with torch.no_grad():
            wanted = self.decode(target)
        return self.lpips(self.decode(x0), wanted).mean()
