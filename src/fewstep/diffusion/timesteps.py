"""Where to train (random native times) and where to step (decreasing grids of native times)."""

import torch
from torch import Tensor

from fewstep.seeding import Draws

LOWEST, HIGHEST = 0.1, 0.95  # of the levels that random times are drawn from, as shares


def lognormal_sigma(draws: Draws, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """EDM's training noise levels, ln(sigma) ~ N(mean, std^2); (B,) (arXiv 2206.00364, table 1)."""
    return (draws.randn() * std + mean).exp()


def uniform_level(draws: Draws, levels: Tensor, min_index: int = 0, max_index: int = 999) -> Tensor:
    """Uniform over levels[min_index .. max_index], both included; (B,).

    `levels` are a schedule's: integer times for VP, 1,000 Karras noise levels for EDM. DMD2 trains the student in
    [20, 980] and the critic in [0, 999] (spec, 1.2 and 1.3). `levels` lie on the device of `draws`.
    """
    return levels[draws.randint(min_index, max_index + 1)]


def logit_normal(draws: Draws, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Flow times, logit(t) ~ N(mean, std^2); (B,) (SD3, arXiv 2403.03206, equation 19)."""
    return torch.sigmoid(draws.randn() * std + mean)


def shifted_uniform(draws: Draws, shift: float = 1.0) -> Tensor:
    """Uniform flow times moved towards noise; (B,)."""
    return shift_time(draws.rand(), shift)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t -> s t / (1 + (s - 1) t), the resolution shift of flow models (SD3, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


def karras_grid(num: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels from sigma_max down to sigma_min, evenly spaced in sigma^(1/rho); (num,) float64.

    A grid of one is [sigma_max]; the last step, to a clean image, is the sampler's (arXiv 2206.00364, equation 5).
    """
    ramp = torch.linspace(0, 1, num, dtype=torch.float64)
    grid: Tensor = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    grid[-1] = sigma_min  # both ends exactly, and sigma_max if there is but one
    grid[0] = sigma_max
    return grid


def index_grid(num: int, num_timesteps: int = 1000) -> Tensor:
    """Exactly `num` evenly spaced integer times from T-1 down: 999, 749, 499, 249 for 4 of 1000; (num,).

    Also right where `num` does not divide T, for which the reference's list has too many entries (spec, 1.5).
    """
    return num_timesteps - 1 - torch.arange(num) * num_timesteps // num


def random_grid(levels: Tensor, draws: Draws) -> Tensor:
    """The noisiest of `levels`, and as many random ones from 10 to 95 % of them as there are draws, decreasing; (num,).

    As CDM draws the times of a student of any number of steps, in [.25, .95] of a flow's (arXiv 2605.06376). `levels`
    lie on the device of `draws`.
    """
    low, high = LOWEST * len(levels), HIGHEST * len(levels)
    inner = draws.rand().sort(descending=True).values
    indices = (low + (high - low) * inner).long()
    return torch.cat([levels[-1:], levels[indices]])


def trailing_grid(num: int, num_timesteps: int = 1000) -> Tensor:
    """diffusers' "trailing" spacing, round(T - k T / num) - 1 for k = 0 .. num-1; (num,) integers.

    The same as `index_grid` where `num` divides T. Always `num` of them: diffusers has one too many for 61, 103, ...
    """
    step = num_timesteps - (num_timesteps - num_timesteps / num)  # as numpy steps, which decides ties of rounding
    return (num_timesteps - torch.arange(num, dtype=torch.float64) * step).round().long() - 1
