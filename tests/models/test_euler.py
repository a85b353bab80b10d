"""The euler sampler against diffusers' scheduler and the textbook's step, on networks that predict eps and v."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.parameterizations import edm, eps, v
from fewstep.diffusion.schedules import EDM, VP
from fewstep.models.latent_model import LatentModel
from fewstep.models.sampler import Sampler, euler, parse_sampler, sample
from tiny_pipelines import TINY

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = {"epsilon": eps, "v_prediction": v}


class Wave(nn.Module):
    """A network that is not linear and depends on the time, in the dtype of its input."""

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.sin(1.3 * x + t.to(x.dtype).reshape(-1, 1, 1, 1) / 300) + 0.2 * x


def noise(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def scheduler_of(prediction_type: str, num_steps: int) -> EulerDiscreteScheduler:
    scheduler = EulerDiscreteScheduler(**SD_BETAS, prediction_type=prediction_type, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("num_steps", [1, 3, 7, 50])  # 3 and 7 don't divide 1000
@pytest.mark.parametrize("prediction_type", KINDS)
def test_on_vp_it_is_diffusers_with_trailing_spacing(prediction_type: str, num_steps: int) -> None:
    """In float32, in which the scheduler computes, whatever it is given."""
    scheduler, network = scheduler_of(prediction_type, num_steps), Wave()
    x = noise(torch.float32) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(3), {}), t, x).prev_sample
    denoiser = Denoiser(network, VP(DDIMScheduler(**SD_BETAS).alphas_cumprod), KINDS[prediction_type])
    ours = euler(denoiser, noise(torch.float32), num_steps, {})
    assert (ours - x).abs().max() < 2e-5 * x.abs().max()


@pytest.mark.parametrize("num_steps", [1, 3, 50])
@pytest.mark.parametrize("prediction_type", KINDS)
def test_on_vp_it_is_eulers_method_in_sigma_over_alpha(prediction_type: str, num_steps: int) -> None:
    """In float64, by the textbook: y = x / alpha, k = sigma / alpha, dy/dk = eps; the scheduler gives the times."""
    abar = VP.scaled_linear().alphas_cumprod[scheduler_of(prediction_type, num_steps).timesteps.long()]
    k = [*((1 - abar) / abar).sqrt().tolist(), 0.0]
    y = noise(torch.float64) * k[0]
    for index, t in enumerate(scheduler_of(prediction_type, num_steps).timesteps):
        alpha, sigma = abar[index].sqrt(), (1 - abar[index]).sqrt()
        predicted = Wave()(alpha * y, t.double().expand(3), {})
        direction = predicted if prediction_type == "epsilon" else alpha * predicted + sigma * alpha * y
        y = y + (k[index + 1] - k[index]) * direction
    ours = euler(Denoiser(Wave(), VP.scaled_linear(), KINDS[prediction_type]), noise(torch.float64), num_steps, {})
    assert (ours - y).abs().max() < 1e-12 * y.abs().max()


@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_on_edm_it_is_the_first_order_sampler(num_steps: int) -> None:
    """x <- x + (t' - t)(x - D(x; t)) / t along Karras' levels, the last to 0 (arXiv 2206.00364, algorithm 1)."""
    denoiser = Denoiser(Wave(), EDM(0.01, 20.0), edm(0.5))
    step = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    levels = [*((20 ** (1 / 7) + step * (0.01 ** (1 / 7) - 20 ** (1 / 7))) ** 7).tolist(), 0.0]
    x = 20.0 * noise(torch.float64)
    for t, next_t in pairwise(levels):
        x = x + (next_t - t) * (x - denoiser(x, torch.full((3,), t, dtype=torch.float64), {})) / t
    ours = euler(denoiser, noise(torch.float64), num_steps, {})
    assert (ours - x).abs().max() < 1e-12 * x.abs().max()


def test_it_is_chosen_by_name_and_takes_guidance(tmp_path: Path) -> None:
    """The name in one spelling, whatever the user's; guidance is diffusers' on the raw network."""
    assert [str(parse_sampler(text)) for text in ("euler:3@8.0", "euler:3@1", "heun:18")] == [
        "euler:3@8",
        "euler:3",
        "heun:18",
    ]
    model = LatentModel(TINY["sd"](tmp_path))
    condition, null, scheduler = model.text_condition(["cat"]), model.null_condition, scheduler_of("epsilon", 3)
    x = (first := torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1)))[
        0
    ] * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            without, with_text = (model.network(scaled, t, each["text"]).sample for each in (null, condition))
            x = scheduler.step(without + 8 * (with_text - without), t, x).prev_sample
    ours = sample(model, Sampler("euler", 3, 8.0), first, condition)
    assert (ours - x).abs().max() < 1e-5 * x.abs().max()
