"""Regression of a one-step student on pairs of its teacher, the start of one-step SDXL (DMD2, 5.2; spec, 1.7)."""

from fewstep.diffusion.denoiser import Denoiser
from fewstep.models.image_model import ImageModel
from fewstep.networks.blocks import checkpoint_blocks
from fewstep.runtime.ema import EMA
from fewstep.training.method import Batch, Metrics
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
            checkpoint_blocks(student.network)
        self.student_optimizer = Optimizer(student.parameters(), settings.student.optimizer, num_steps)
        self.ema = EMA(student, settings.student.ema_decay)

    def step(self, batch: Batch, step: int) -> Metrics:
        """One update; nothing in it is random."""
        loss = self.loss(self.student, self.timesteps, batch)
        loss.backward()
        grad_norm = self.student_optimizer.step()
        self.ema.update()
        return {"regression_loss": loss.detach(), "student_grad_norm": grad_norm}
