"""The 95 % intervals of the metrics: of shares Wilson's, of means a bootstrap's, of functions of sums a jackknife's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.metric_table import Interval
from fewstep.seeding import generator

Z = 1.959963984540054  # of 95 % of a normal distribution
RESAMPLES = 1000
DRAWN_AT_ONCE = 2**20  # numbers of a bootstrap, 8 MB


@dataclass(frozen=True)
class Mean:
    """The mean of independent numbers (N,), in the table as it is; `less` that of others (M,) where there are any."""

    of: Tensor
    less: Tensor | None = None

    @property
    def value(self) -> float:
        below = 0.0 if self.less is None else self.less.double().mean().item()
        return self.of.double().mean().item() - below


@dataclass(frozen=True)
class Estimate:
    """A value and its standard deviation, NaN where none is known."""

    value: float
    deviation: float


def wilson_interval(share: float, cases: int) -> Interval:
    """The 95 % interval of a share p of n independent cases (Wilson 1927).

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    middle = share + Z**2 / (2 * cases)
    reach = Z * (share * (1 - share) / cases + Z**2 / (4 * cases**2)) ** 0.5
    low, high = (middle - reach) / (1 + Z**2 / cases), (middle + reach) / (1 + Z**2 / cases)
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # of no case and of all of them rounding is beside it


def jackknife_deviation(without: Tensor) -> float:
    """s of a function, from its values f_i (g,) without the i-th of g groups: s^2 = (g-1)/g sum_i (f_i - mean)^2.

    The delete-a-group jackknife (Efron and Stein 1981); NaN of fewer than two groups.
    """
    num = len(without)
    return ((num - 1) * without.double().var(correction=0)).sqrt().item() if num > 1 else float("nan")


def normal_interval(value: float, deviation: float) -> Interval:
    return value - Z * deviation, value + Z * deviation


def bootstrap_interval(mean: Mean, seed: int = 0) -> Interval:
    """Between the 2.5th and the 97.5th percentile of the mean over `RESAMPLES` draws with replacement (Efron 1979).

    A function of the numbers and the seed; where others are subtracted, both sets are drawn anew.
    """
    draws = generator(seed, "bootstrap")
    found = _resampled(mean.of.double(), draws)
    if mean.less is not None:
        found -= _resampled(mean.less.double(), draws)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _resampled(numbers: Tensor, draws: torch.Generator) -> Tensor:
    """The mean of each resample, (RESAMPLES,), a bounded part of the draws at a time."""
    rows = max(1, DRAWN_AT_ONCE // len(numbers))
    sizes = [min(rows, RESAMPLES - first) for first in range(0, RESAMPLES, rows)]
    drawn = (torch.randint(len(numbers), (size, len(numbers)), generator=draws) for size in sizes)
    return torch.cat([numbers[each].mean(1) for each in drawn])
