"""Regression of a one-step student on pairs of its teacher, the start of one-step SDXL (DMD2, 5.2; spec, 1.7)."""

from collections.abc import Sequence

import torch

from fewstep.diffusion.denoiser import Denoiser
from fewstep.models.image_model import ImageModel
from fewstep.networks.blocks import checkpoint_blocks
from fewstep.runtime.ema import EMA
from fewstep.training.method import Batch, Metrics, Part, can_learn, count_broken, of_parts
from fewstep.training.optimization import Optimizer
from fewstep.training.pair_loss import PairLoss
from fewstep.training.settings import RegressSettings
from fewstep.training.student import StudentMethod, student_timesteps


class Regression(StudentMethod):
    """Every step updates the student on a batch of pairs."""

    STATE = ("student", "ema", "student_optimizer")

    def __init__(
        self, settings: RegressSettings, model: ImageModel, student: Denoiser, pair_loss: PairLoss, num_steps: int
    ):
        self.model, self.student, self.loss = model, student, pair_loss
        self.timesteps = student_timesteps(settings.student, student.schedule).to(model.device)
        if settings.checkpointing == "blocks":
            checkpoint_blocks(student.network)  # before any pass
        self.student_optimizer = Optimizer(student.parameters(), settings.student.optimizer, num_steps)
        self.ema = EMA(student, settings.student.ema_decay)

    def step(self, parts: Sequence[Part], step: int) -> Metrics:
        """One update; nothing in it is random."""
        found = of_parts([self._gradients(batch, 1 / len(parts)) for _, batch in parts])
        norm, skipped = self.student_optimizer.step(can_learn(found, parts))
        self.ema.update()
        return found | {"student_grad_norm": norm, "skipped_student": skipped}

    def _gradients(self, batch: Batch, weight: float) -> Metrics:
        loss = self.loss(self.student, self.timesteps, batch).mean()  # of (B,)
        torch.autograd.backward(weight * loss)
        return {"regression_loss": loss.detach(), **count_broken(data=batch["x0"])}
