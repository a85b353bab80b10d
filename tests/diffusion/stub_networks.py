"""Networks whose answers are known, and the comparison that the tests of this folder share."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.parameterizations import eps, flow, v, x0
from fewstep.diffusion.schedules import VP, Flow, NoiseSchedule, broadcast

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = [(eps, "epsilon"), (v, "v_prediction"), (x0, "sample")]
kinds = pytest.mark.parametrize(("parameterization", "prediction_type"), KINDS, ids=["eps", "v", "x0"])
TIMES = torch.tensor([0, 20, 249, 499, 749, 999])
FLOW_TIMES = torch.tensor([0.001, 0.01, 0.3, 0.5, 0.7, 1.0])


def vp_scheduler(kind: type, **options: object):
    """A scheduler of Stable Diffusion with its products of alphas in float64."""
    scheduler = kind(**SD_BETAS, **options)
    scheduler.alphas_cumprod = VP.scaled_linear().alphas_cumprod
    return scheduler


TARGETS = [
    (VP.scaled_linear(), eps, TIMES, lambda x0, noise: noise),
    (VP.scaled_linear(), v, TIMES, lambda x0, noise: vp_scheduler(DDPMScheduler).get_velocity(x0, noise, TIMES)),
    (VP.scaled_linear(), x0, TIMES, lambda x0, noise: x0),
    (Flow(), flow, FLOW_TIMES, lambda x0, noise: noise - x0),
]
targets = pytest.mark.parametrize(
    ("schedule", "parameterization", "t", "target"), TARGETS, ids=["eps", "diffusers' v", "x0", "flow"]
)


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
