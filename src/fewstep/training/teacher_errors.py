"""The teacher's own denoising loss on real data by noise level, which the critic's is measured by."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.losses import denoising_loss
from fewstep.models.image_model import ImageModel
from fewstep.runtime.tracking import progress_bar
from fewstep.seeding import Draws, generator
from fewstep.training.batches import BatchAt
from fewstep.training.settings import LoopSettings

NUM_IMAGES = 128  # 32 passes of SDXL's
NUM_LEVELS = 16


@dataclass(frozen=True)
class TeacherErrors:
    """`errors` (T,) at the schedule's `levels` (T,), ascending, float64, both on the model's device."""

    levels: Tensor
    errors: Tensor

    def at(self, t: Tensor) -> Tensor:
        """At the nearest level from t (B,) upwards; (B,)."""
        index = torch.searchsorted(self.levels, t.to(self.levels.dtype))
        return self.errors[index.clamp_max(len(self.levels) - 1)]


@torch.no_grad()
def teacher_errors(denoiser: Denoiser, model: ImageModel, batch_at: BatchAt, settings: LoopSettings) -> TeacherErrors:
    """A table from images of the run's first batches, which a resumed run makes again, bit for bit.

    `denoiser` is the teacher without guidance, which is no denoiser of any data. Each image is noised to one of 16
    levels, in turn, and each level has the mean over its images (8 of 128); between levels the table is linear in their
    index. So it has an error of its own, some per cent, which is the same in the whole run.
    """
    size, seen = min(settings.batch_size, model.sampling_batch), settings.num_steps * settings.batch_size
    num, known = min(NUM_IMAGES, seen), denoiser.schedule.levels.to(model.device)  # a short run has no use for more
    num_levels = min(NUM_LEVELS, num)
    places = torch.linspace(0, len(known) - 1, num_levels).round().long().to(model.device)
    found = [list[Tensor]() for _ in range(num_levels)]
    with progress_bar("teacher's errors", num) as show:
        for step in range(-(-num // size)):
            batch, draws = batch_at(step, range(size)), Draws(_generator(settings, step, model), range(size), size)
            x0, condition = model.encode_x0(batch, draws), model.encode_condition(batch)
            turn = (torch.arange(size, device=model.device) + step * size) % num_levels
            t = known[places[turn]]  # (B,)
            x_t = denoiser.schedule.add_noise(x0, draws.randn(*x0.shape[1:]), t)
            losses = denoising_loss(denoiser(x_t, t, condition), x0, denoiser.coefficients(t)[1])  # (B,)
            for level, loss in zip(turn.tolist(), losses, strict=True):
                found[level].append(loss)
            show(min(num, (step + 1) * size), {})
    means = torch.stack([torch.stack(each).nanmean() for each in found])  # a broken image is NaN, and left out
    errors = interpolate(means[None, None], len(known), mode="linear", align_corners=True)[0, 0]
    return TeacherErrors(known.double(), errors)


def _generator(settings: LoopSettings, step: int, model: ImageModel) -> torch.Generator:
    return generator(settings.seed, "teacher's errors", step, model.device)
