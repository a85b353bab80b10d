"""Training a teacher from scratch, as EDM does (arXiv 2206.00364, table 1), for a job that needs no download."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.losses import denoising_loss
from fewstep.diffusion.sampling import heun
from fewstep.models.image_model import Asked, ImageModel
from fewstep.runtime.ema import EMA
from fewstep.seeding import Draws, Random
from fewstep.training.method import Batch, Method, Metrics, Part, can_learn, count_broken, of_parts, share_of
from fewstep.training.noise_levels import level_sampler
from fewstep.training.optimization import Optimizer
from fewstep.training.settings import TeacherSettings


class TeacherTraining(Method):
    """loss = mean ((x0_hat - x0) / c_out)^2 at random levels: EDM's loss, and eps- or v-MSE for other networks."""

    STATE = ("denoiser", "ema", "optimizer")
    NUM_SAMPLER_STEPS = 18  # Heun, 35 calls: for the sample grids

    def __init__(self, settings: TeacherSettings, model: ImageModel, num_steps: int, batch_size: int, seed: int):
        self.settings, self.model, self.batch_size, self.seed = settings, model, batch_size, seed
        self.denoiser = model.denoiser.train()
        self.optimizer = Optimizer(self.denoiser.parameters(), settings.optimizer, num_steps)
        self.ema = EMA(self.denoiser, settings.ema_decay)
        # For guidance later; made here, for of text it is a pass of the encoders.
        self.null_condition = model.null_condition if settings.class_dropout else None
        self.draw_levels = level_sampler(settings.noise, self.denoiser.schedule, model.device)

    def compute(self, parts: Sequence[Part], turn: Any, random: Random) -> Metrics:
        """One update; gives the loss and the gradient norm before clipping."""
        found = of_parts([self._gradients(rows, batch, random, share_of(parts)) for rows, batch in parts])
        norm, skipped = self.optimizer.step(can_learn(found, parts))
        return found | {"grad_norm": norm, "skipped_network": skipped}

    def advance(self, turn: Any) -> None:
        self.optimizer.advance()
        self.ema.update()

    def _gradients(self, rows: range, batch: Batch, random: Random, weight: float) -> Metrics:
        draws = random.draws("teacher", rows, self.batch_size)
        x0, condition = self.model.encode_x0(batch, draws), self.model.encode_condition(batch)
        if self.null_condition:
            condition = drop_condition(condition, self.null_condition, self.settings.class_dropout, draws)
        t, eps = self.draw_levels(draws), draws.randn(*x0.shape[1:])  # (B,), (B, C, H, W)
        x0_hat = self.denoiser(self.denoiser.schedule.add_noise(x0, eps, t), t, condition)  # (B, C, H, W)
        loss = denoising_loss(x0_hat, x0, self.denoiser.coefficients(t)[1]).mean()
        torch.autograd.backward(weight * loss)
        return {"denoising_loss": loss.detach(), **count_broken(data=x0, network=x0_hat.detach())}

    def sample(self, noise: Tensor, first: int = 0, asked: Asked = None) -> Tensor:
        """uint8 images number `first` and on from noise (1, B, ...) with the averaged weights."""
        grid = self.denoiser.schedule.ode_grid(self.NUM_SAMPLER_STEPS).to(noise.device)  # (18,)
        condition = self.model.conditions(range(first, first + noise.shape[1]), asked)
        with self.averaged_model() as model:
            return model.decode(heun(model.denoiser, noise[0], grid, condition))

    @contextmanager
    def averaged_model(self, ema: str | None = None) -> Iterator[ImageModel]:
        """The model with the averaged weights and without dropout, inside the context alone."""
        self.denoiser.eval()
        with super().averaged_model(ema) as model:
            yield model
        self.denoiser.train()


def drop_condition(condition: Condition, null: Condition, probability: float, draws: Draws) -> Condition:
    """The condition with this share of the samples replaced by the null condition, of (1, ...) tensors."""
    dropped = draws.rand() < probability  # (B,)
    return condition | {
        key: torch.where(dropped.reshape(-1, *(1,) * (value.ndim - 1)), value, condition[key])
        for key, value in null.items()
    }
