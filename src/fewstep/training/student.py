"""The few-step student: its settings, and what its training methods share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.sampling import rollout
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.errors import UserError
from fewstep.models.image_model import Asked, ImageModel
from fewstep.runtime.ema import EMA
from fewstep.training.method import Method, Metrics
from fewstep.training.optimization import Optimizer
from fewstep.training.settings import StudentSettings


class StudentMethod(Method):
    """A student in training: how it is updated, sampled and judged."""

    model: ImageModel

    def __init__(self, settings: StudentSettings, model: ImageModel, student: Denoiser, num_updates: int):
        self.model, self.student = model, student
        self.timesteps = student_timesteps(settings, student.schedule).to(model.device)  # (K,) native times, decreasing
        self.num_noises = len(self.timesteps)
        self.student_optimizer = Optimizer(student.parameters(), settings.optimizer, num_updates)
        self.ema = EMA(student, settings.ema_decay)

    def update_student(self, finite: Tensor) -> Metrics:
        """One update along the gradients that the parts have added."""
        norm, skipped = self.student_optimizer.step(finite)
        # Also behind a skipped update, in which the weights stayed: an average is one over turns.
        self.ema.update()
        return {"student_grad_norm": norm, "skipped_student": skipped}

    def sample(self, noise: Tensor, first: int = 0, asked: Asked = None) -> Tensor:
        """uint8 images number `first` and on from noise (K, B, ...) with the averaged weights."""
        condition = self.model.conditions(range(first, first + noise.shape[1]), asked)
        with self.ema.applied():
            # what training calls, too
            x0 = rollout(self.student, noise, self.timesteps, condition, stop=len(self.timesteps) - 1)
        return self.model.decode(x0)

    @contextmanager
    def averaged_model(self, ema: str | None = None) -> Iterator[ImageModel]:
        """The student with its timesteps and its averaged weights, inside the context alone."""
        with self.ema.applied(ema):
            yield self.model.student(self.student, self.timesteps.tolist())


def student_timesteps(settings: StudentSettings, schedule: NoiseSchedule) -> Tensor:
    """The K native times of the recipe, or evenly spaced ones; raises UserError if the schedule has no such times."""
    if settings.timesteps is None:
        return schedule.grid(settings.num_timesteps)
    timesteps = torch.tensor(settings.timesteps, dtype=torch.float64)  # EDM's are noise levels, not integers
    try:
        schedule.check_timesteps(timesteps)
    except ValueError as error:
        raise UserError(f"student.timesteps: {error}") from error
    return timesteps
