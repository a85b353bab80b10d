"""Regression of a one-step student on pairs of its teacher, the start of one-step SDXL (DMD2, 5.2; spec, 1.7)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.sampling import rollout
from fewstep.models.autoencoder import Decode
from fewstep.models.image_model import ImageModel
from fewstep.networks.blocks import checkpoint_blocks
from fewstep.seeding import Random
from fewstep.training.method import Batch, Metrics, Part, StudentMethod, can_learn, count_broken, of_parts, share_of
from fewstep.training.settings import RegressSettings

Distance = Callable[[Tensor, Tensor], Tensor]
"""From two batches of pixels (B, C, H, W) around [-1, 1] to (B,), with gradient."""


class PairLoss:
    """LPIPS(decode(x0), decode(target)), or mean (x0 - target)^2 without `lpips`; one number per sample.

    x0 is the student's at its first timestep, from the pair's own noise (spec, 1.7; DMD, arXiv 2311.18828, equation 9).
    """

    def __init__(self, model: ImageModel, lpips: Distance | None = None, decode: Decode | None = None):
        self.model, self.lpips, self.decode = model, lpips, decode or model.decode_pixels

    def __call__(self, student: Denoiser, timesteps: Tensor, batch: Batch) -> Tensor:
        """The loss (B,) of {"noise", "x0": (B, C, H, W), ...} with what `encode_condition` takes; timesteps (K,)."""
        noise, target = (batch[name].to(self.model.device).float() for name in ("noise", "x0"))  # halves on disk
        condition = self.model.encode_condition(batch)
        x0 = rollout(student, noise[None], timesteps, condition, stop=0, grad=True)  # as at inference: (B, C, H, W)
        if self.lpips is None:
            squares: Tensor = (x0 - target).square()  # (B, C, H, W)
            return squares.flatten(1).mean(1)
        with torch.no_grad():
            wanted = self.decode(target)  # pixels, without a graph
        return self.lpips(self.decode(x0), wanted)


class Regression(StudentMethod):
    """Every step updates the student on a batch of pairs."""

    STATE = ("student", "ema", "student_optimizer")

    def __init__(
        self, settings: RegressSettings, model: ImageModel, student: Denoiser, pair_loss: PairLoss, num_steps: int
    ):
        if settings.checkpointing == "blocks":
            checkpoint_blocks(student.network)  # before any pass
        super().__init__(settings.student, model, student, num_steps)
        self.loss = pair_loss

    def compute(self, parts: Sequence[Part], turn: Any, random: Random) -> Metrics:
        """One update; nothing in it is random."""
        found = of_parts([self._gradients(batch, share_of(parts)) for _, batch in parts])
        return found | self.update_student(can_learn(found, parts))

    def _gradients(self, batch: Batch, weight: float) -> Metrics:
        loss = self.loss(self.student, self.timesteps, batch).mean()  # of (B,)
        torch.autograd.backward(weight * loss)
        return {"regression_loss": loss.detach(), **count_broken(data=batch["x0"])}
