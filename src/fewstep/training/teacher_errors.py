"""The teacher's own denoising loss on real data, by noise level, which the critic's is measured by."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fewstep.diffusion.denoiser import Condition, Denoiser, Guided
from fewstep.diffusion.losses import denoising_loss
from fewstep.models.image_model import ImageModel
from fewstep.runtime.tracking import progress_bar
from fewstep.seeding import Draws, generator
from fewstep.training.batches import BatchAt
from fewstep.training.settings import LoopSettings

NUM_IMAGES = 128  # 32 passes of SDXL's
MOST_IMAGES = 2048  # of 8x8 pixels tables of 128 images differ by a tenth, of 512 by three per cent, of these by one
NUM_NUMBERS = 2**21  # of all images together, where that lies between the two: small ones average less noise
NUM_LEVELS = 16
MOST_BATCHES = 8
LITTLE_NOISE = 0.1, 0.25  # shares of the schedule's levels


@dataclass(frozen=True)
class TeacherErrors:
    """`errors` (T,) at the schedule's `levels` (T,), ascending, float64, both on the model's device."""

    levels: Tensor
    errors: Tensor

    def at(self, t: Tensor) -> Tensor:
        """At the nearest level from t (B,) upwards; (B,)."""
        index = torch.searchsorted(self.levels, t.to(self.levels.dtype))
        return self.errors[index.clamp_max(len(self.levels) - 1)]


class Noised(NamedTuple):
    """Real images x0 (B, ...) noised to t (B,), which are the levels of these numbers."""

    x0: Tensor
    x_t: Tensor
    t: Tensor
    condition: Condition
    level: list[int]


@torch.no_grad()
def teacher_errors(denoiser: Denoiser, model: ImageModel, batch_at: BatchAt, settings: LoopSettings) -> TeacherErrors:
    """A table from images of the run's first batches, which a resumed run makes again, bit for bit.

    `denoiser` is the teacher without guidance, which is no denoiser of any data. Each image is noised to one of 16
    levels, in turn, and each level has the mean over its images (8 of 128, and more of small ones); between levels the
    table is linear in their index. So it has an error of its own, some per cent, which is the same in the whole run.
    """
    known = denoiser.schedule.levels.to(model.device)
    num = _at_most(min(max(NUM_NUMBERS // prod(model.shape), NUM_IMAGES), MOST_IMAGES), settings)
    num_levels = min(NUM_LEVELS, num)
    places = torch.linspace(0, len(known) - 1, num_levels).round().long().to(model.device)
    found = [list[Tensor]() for _ in range(num_levels)]
    for each in _noised(model, batch_at, settings, known[places], num):
        for level, loss in zip(each.level, _losses(denoiser, each, each.condition), strict=True):
            found[level].append(loss)
    means = torch.stack([torch.stack(each).nanmean() for each in found])  # a broken image is NaN, and left out
    errors = interpolate(means[None, None], len(known), mode="linear", align_corners=True)[0, 0]
    return TeacherErrors(known.double(), errors)


@torch.no_grad()
def null_error(teacher: Guided, model: ImageModel, batch_at: BatchAt, settings: LoopSettings) -> Tensor:
    """The denoising loss of the null condition over that of the images' own, at little noise; () on the device.

    There the picture tells what a condition would: it is 1, and a bit, of a condition that the teacher was trained
    with, as "" or a null class, and more of one that it never saw, as zeros in its place.
    """
    known = teacher.schedule.levels.to(model.device)  # (T,)
    low, high = (round(share * len(known)) for share in LITTLE_NOISE)
    levels = known[torch.linspace(low, high, 4).round().long().to(model.device)]
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)
    for each in _noised(model, batch_at, settings, levels, _at_most(NUM_IMAGES, settings)):
        null = {key: value.expand(len(each.t), *value.shape[1:]) for key, value in teacher.null_condition.items()}
        conditions = (each.condition | null, each.condition)
        losses = torch.stack([_losses(teacher.denoiser, each, condition) for condition in conditions])  # (2, B)
        sums += losses.nansum(1)
    return sums[0] / sums[1]


def _at_most(num: int, settings: LoopSettings) -> int:
    """Of a few batches, however many the run has: one that is made longer goes on with the same numbers."""
    return min(num, MOST_BATCHES * settings.batch_size)


def _noised(model: ImageModel, batch_at: BatchAt, settings: LoopSettings, levels: Tensor, num: int) -> Iterator[Noised]:
    """Images of the run's first batches, each at one of the levels, in turn."""
    size = min(settings.batch_size, model.sampling_batch)
    with progress_bar("teacher's errors", num) as show:
        for step in range(-(-num // size)):
            random = generator(settings.seed, "teacher's errors", step, model.device)
            batch, draws = batch_at(step, range(size)), Draws(random, range(size), size)
            x0, condition = model.encode_x0(batch, draws), model.encode_condition(batch)
            turn = (torch.arange(size, device=model.device) + step * size) % len(levels)
            t = levels[turn]  # (B,)
            x_t = model.denoiser.schedule.add_noise(x0, draws.randn(*x0.shape[1:]), t)
            yield Noised(x0, x_t, t, condition, turn.tolist())
            show(min(num, (step + 1) * size), {})


def _losses(denoiser: Denoiser, noised: Noised, condition: Condition) -> Tensor:
    return denoising_loss(denoiser(noised.x_t, noised.t, condition), noised.x0, denoiser.coefficients(noised.t)[1])
