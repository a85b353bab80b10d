"""The student's samples beside what teacher and critic make of them at several noise levels."""

from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from fewstep.diffusion.denoiser import Condition, Denoiser, Guided
from fewstep.models.image_model import ImageModel
from fewstep.pictures import grid
from fewstep.seeding import generator

LEVELS = (50, 250, 500, 750, 950)  # of a schedule's 0 .. 999: from the least noise to almost nothing else
HEADS = ("student", "teacher", "critic")
NUM_SAMPLES = 3


def num_samples(model: ImageModel) -> int:
    """How many a panel shows, of each side by side three pictures; guidance doubles what the teacher is given."""
    return min(NUM_SAMPLES, max(1, model.sampling_batch // 2))


@torch.no_grad()
def panel(
    model: ImageModel, teacher: Denoiser | Guided, critic: Denoiser, x0: Tensor, condition: Condition, seed: int
) -> Image:
    """A row per level: samples x0 (N, C, H, W), the teacher's x0 and the critic's of them noised to that level.

    The noise is the same at all levels and in all panels of a seed. Where the critic is well its pictures are like the
    student's; what the teacher's have and they lack is what the student is pulled to.
    """
    schedule: Any = critic.schedule
    eps = torch.randn(x0.shape, generator=generator(seed, "panel")).to(x0.device)
    levels = [schedule.levels[round(level / 999 * (len(schedule.levels) - 1))].to(x0.device) for level in LEVELS]
    predicted = []
    for level in levels:
        t = level.expand(len(x0))  # (N,)
        x_t = schedule.add_noise(x0, eps, t)
        predicted.append([denoiser(x_t, t, condition) for denoiser in (teacher, critic)])
    model.release()  # text encoders: a small card has no room for them and for what decoding takes
    x = model.decode(x0)
    rows = [torch.stack([x, *map(model.decode, pair)], 1).flatten(0, 1) for pair in predicted]  # (3 N, C, H, W)
    sides = [f"level {level}\nt = {t.item():.3g}" for level, t in zip(LEVELS, levels, strict=True)]
    return grid(torch.cat(rows), 3 * len(x0), heads=HEADS * len(x0), sides=sides)
