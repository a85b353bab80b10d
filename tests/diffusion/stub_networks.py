"""Networks whose answers are known, and the comparison that the tests of this folder share."""

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.schedules import NoiseSchedule, broadcast


class SmoothNetwork(nn.Module):
    """tanh(weight x + ln(1 + t)/4 + everything in the condition) in float64; `calls` records what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.calls: list[tuple[Tensor, Tensor, Condition]] = []
        self.grad_modes: list[bool] = []

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append((x, t, condition))
        self.grad_modes.append(torch.is_grad_enabled())
        bias = torch.log1p(t.double()) / 4 + sum(condition.values(), torch.zeros(len(x)))
        return torch.tanh(self.weight * x + broadcast(bias, x))


class GaussianPosterior(nn.Module):
    """E[x0 | x_t] for data N(mean, std^2), the optimal x0 prediction."""

    def __init__(self, schedule: NoiseSchedule, mean: float = 0.4, std: float = 0.6) -> None:
        super().__init__()
        self.schedule, self.mean, self.std = schedule, mean, std

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (broadcast(c, x) for c in self.schedule.alpha_sigma(t))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Unit noise in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
