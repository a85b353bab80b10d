"""Random native times as a recipe asks for them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fewstep.diffusion import timesteps
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.errors import UserError
from fewstep.seeding import Draws
from fewstep.training.settings import NoiseLevels

NoiseLevelSampler = Callable[[Draws], Tensor]


def level_sampler(noise: NoiseLevels, schedule: NoiseSchedule, device: torch.device) -> NoiseLevelSampler:
    """From draws on `device` to native times (B,); raises UserError if the schedule has no such times."""
    # A lognormal sigma is no time of a VP schedule, though a network would take the number.
    if noise.distribution not in schedule.distributions:
        fitting = " or ".join(schedule.distributions)
        raise UserError(f"noise.distribution: {noise.distribution} is not for the teacher's schedule; take {fitting}")
    levels = schedule.levels.to(device)  # here, once, for no step should copy them
    functions: dict[str, NoiseLevelSampler] = {
        "index": partial(timesteps.uniform_level, levels=levels, min_index=noise.min_index, max_index=noise.max_index),
        "lognormal": partial(timesteps.lognormal_sigma, mean=noise.mean, std=noise.std),
        "logit_normal": partial(timesteps.logit_normal, mean=noise.mean, std=noise.std),
        "shifted": partial(timesteps.shifted_uniform, shift=noise.shift),
    }
    return functions[noise.distribution]
