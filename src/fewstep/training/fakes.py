"""The student's samples of a step: at which of its timesteps they are taken, and on what path they come there."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.sampling import mixed_rollout, whole_rollout
from fewstep.diffusion.timesteps import random_grid
from fewstep.models.image_model import ImageModel
from fewstep.seeding import Draws, Random, generator
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.pool import Pool


@dataclass(frozen=True)
class Turn:
    """What the host decides of a step."""

    student: bool
    """Whether the student is updated."""
    stop: int
    """The index of the timestep that is trained: one for the whole batch (spec, 1.5), or that of its row 0."""
    num_timesteps: int
    """Of the grid."""


@dataclass(frozen=True)
class Fake:
    """Samples, in the student's turn with their graph, and what they are of."""

    x0: Tensor  # (B, C, H, W)
    condition: Condition
    stops: Tensor  # (B,) int64: at which of the timesteps
    noise: Tensor | None = None  # (B, C, H, W), unit noise that their rollout began with


class Fakes:
    """Draws a student's samples; all that is random in it is a function of seed and step, or of a step's draws."""

    def __init__(self, settings: DMD2Settings, model: ImageModel, student: Denoiser, timesteps: Tensor, seed: int):
        self.settings, self.model, self.student, self.timesteps = settings, model, student, timesteps
        self.random = settings.student.timesteps == "random"
        self.levels = student.schedule.levels.to(model.device)
        self.first = 1 if settings.diversity.weight else 0  # the first timestep then has a loss of its own
        self.seeded = partial(generator, seed)
        self.pool = Pool(len(timesteps), model.device) if settings.critic.samples == "cycle" else None

    def turn(self, step: int, stop: int | None = None) -> Turn:
        """Of a step, whose rollout has its own random stop, or the one given."""
        update = step % self.settings.student_every
        drawn_at = step - update if self.pool else step  # one rollout serves a cycle
        num = self.num_timesteps(drawn_at)
        stop = self.draw_stop(drawn_at) if stop is None else stop
        # Of a pool, update k takes the stop behind that of update k - 1: K in a row see every timestep once.
        return Turn(update == 0, (stop + update) % num if self.pool else stop, num)

    def num_timesteps(self, step: int) -> int:
        """Of the grid of a rollout that is drawn at this step."""
        most = len(self.timesteps)
        if not self.random:
            return most
        return int(torch.randint(self.first + 1, most + 1, (), generator=self.seeded("num_timesteps", step)))

    def draw_stop(self, step: int) -> int:
        """Of such a rollout."""
        # Drawn on the CPU: it decides what is run, and the host must not wait for the device to know it.
        return int(torch.randint(self.first, self.num_timesteps(step), (), generator=self.seeded("stop", step)))

    def timesteps_of(self, turn: Turn, random: Random) -> Tensor:
        """The grid of a step, (K,)."""
        if not self.random:
            return self.timesteps
        num = turn.num_timesteps - 1
        return random_grid(self.levels, random.draws("timesteps", range(num), num))

    def simulated(self, given: Condition, turn: Turn, draws: Draws, random: Random) -> Fake:
        """The student's x0 behind its own rollout, up to `stop`, or each sample up to its own.

        Where one rollout serves a cycle it goes on to the last stop that one of its updates takes.
        """
        mixed, times, stop = self.settings.student.stops == "mixed", self.timesteps_of(turn, random), turn.stop
        uses = len(times) if mixed else self.settings.student_every if self.pool else 1
        # with mixed stops for all timesteps, though a part of a batch may not reach the last
        noise = draws.randn(*self.model.shape, before=(len(times) if mixed else min(stop + uses, len(times)),))
        condition = self.model.draw_condition(given, draws)  # fakes have conditions of their own: (B, ...)
        if mixed:
            each = [self._mixed_stop(row, stop, len(times)) for row in draws.rows]
            rows = draws.rows[0] + torch.arange(len(draws), device=draws.device)
            x0 = mixed_rollout(self.student, noise, times, condition, each, turn.student)
            return Fake(x0, condition, self._mixed_stop(rows, stop, len(times)), noise[0])
        x0s = whole_rollout(self.student, noise, times, condition, stop if turn.student else None)
        if self.pool:
            self.pool.put(x0s, condition, draws)
        return Fake(x0s[stop], condition, _all_at(stop, draws), noise[0])

    def _mixed_stop(self, row: Any, stop: int, num: int) -> Any:
        """Of a row number, or of several: in turn from row 0 on, so that a batch has all of them, and one row each."""
        return self.first + (row + stop - self.first) % (num - self.first)

    def again(self, turn: Turn, draws: Draws) -> Fake:
        """What the rollout of the cycle made for a later update."""
        assert self.pool
        return Fake(*self.pool.take(turn.stop, draws.rows), _all_at(turn.stop, draws))

    def of_real(self, real: Tensor, condition: Condition, draws: Draws, grad: bool) -> Fake:
        """The student's x0 of noised real data, each at a random one of its timesteps."""
        schedule = self.student.schedule
        stops = draws.randint(0, len(self.timesteps))  # (B,), for here the input of every sample is real data
        eps, t = draws.randn(*real.shape[1:]), self.timesteps[stops]
        # At the first timestep inference starts from pure noise, so training does.
        noised, pure = schedule.add_noise(real, eps, t), schedule.pure_noise(eps)
        x_t = torch.where(stops.reshape(-1, *(1,) * (real.ndim - 1)) == 0, pure, noised)
        with torch.set_grad_enabled(grad):
            return Fake(self.student(x_t, t, condition), condition, stops)


def _all_at(stop: int, draws: Draws) -> Tensor:
    return torch.full((len(draws),), stop, device=draws.device)
