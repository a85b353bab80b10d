"""Euler, DPM-Solver++ and UniPC against diffusers' own loops and the textbook; guidance and counts of calls."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.parameterizations import edm, eps, v
from fewstep.diffusion.schedules import EDM, VP
from fewstep.errors import UserError
from fewstep.models.latent_model import LatentModel
from fewstep.models.sampler import Sampler, default_sampler, euler, generate, multistep, sample
from tiny_pipelines import BETAS, TINY

SCHEDULERS = {"euler": EulerDiscreteScheduler, "unipc": UniPCMultistepScheduler}
SCHEDULERS |= {"dpm++": DPMSolverMultistepScheduler}
KINDS = {"epsilon": eps, "v_prediction": v}
MEAN, STD = 0.4, 0.6


class Optimal(nn.Module):
    """What an optimal network predicts of data N(MEAN, STD^2), as eps or as v, in the dtype of its input."""

    def __init__(self, prediction_type: str):
        super().__init__()
        self.prediction_type = prediction_type
        self.abar = DDIMScheduler(**BETAS).alphas_cumprod.double()

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        abar = self.abar[t.long()].to(x.dtype).reshape(-1, 1, 1, 1)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        x0 = MEAN + alpha * STD**2 / (abar * STD**2 + 1 - abar) * (x - alpha * MEAN)
        noise = (x - alpha * x0) / sigma
        return noise if self.prediction_type == "epsilon" else alpha * noise - sigma * x0


class Wave(nn.Module):
    """A network that is not linear and depends on the time, in the dtype of its input."""

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.sin(1.3 * x + t.to(x.dtype).reshape(-1, 1, 1, 1) / 300) + 0.2 * x


def noise(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def scheduler_of(kind: str, num_steps: int, prediction_type: str = "epsilon"):
    scheduler = SCHEDULERS[kind](**BETAS, prediction_type=prediction_type, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    return scheduler


def solve(denoiser: Denoiser, kind: str, num_steps: int, start: Tensor) -> Tensor:
    if kind == "euler":
        return euler(denoiser, start, num_steps, {})
    return multistep(denoiser, start, Sampler(kind, num_steps), {})


@pytest.mark.parametrize("num_steps", [1, 3, 7, 50])  # 3 and 7 don't divide 1000
@pytest.mark.parametrize("prediction_type", KINDS)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_on_vp_it_is_diffusers_with_trailing_spacing(kind: str, prediction_type: str, num_steps: int) -> None:
    """In float32, in which the schedulers compute, whatever they are given."""
    scheduler = scheduler_of(kind, num_steps, prediction_type)
    network = Wave() if kind == "euler" else Optimal(prediction_type)
    x = noise() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(3), {}), t, x).prev_sample
    denoiser = Denoiser(network, VP(DDIMScheduler(**BETAS).alphas_cumprod), KINDS[prediction_type])
    difference = (solve(denoiser, kind, num_steps, noise()) - x).abs().max()
    assert difference < (2e-5 if kind == "euler" else 1e-4) * x.abs().max()


@pytest.mark.parametrize("num_steps", [1, 3, 50])
@pytest.mark.parametrize("prediction_type", KINDS)
def test_on_vp_it_is_eulers_method_in_sigma_over_alpha(prediction_type: str, num_steps: int) -> None:
    """In float64, by the textbook: y = x / alpha, k = sigma / alpha, dy/dk = eps; the scheduler gives the times."""
    times = scheduler_of("euler", num_steps).timesteps
    abar = VP.scaled_linear().alphas_cumprod[times.long()]
    k = [*((1 - abar) / abar).sqrt().tolist(), 0.0]
    y = noise(torch.float64) * k[0]
    for index, t in enumerate(times):
        alpha, sigma = abar[index].sqrt(), (1 - abar[index]).sqrt()
        predicted = Wave()(alpha * y, t.double().expand(3), {})
        direction = predicted if prediction_type == "epsilon" else alpha * predicted + sigma * alpha * y
        y = y + (k[index + 1] - k[index]) * direction
    ours = euler(Denoiser(Wave(), VP.scaled_linear(), KINDS[prediction_type]), noise(torch.float64), num_steps, {})
    assert (ours - y).abs().max() < 1e-12 * y.abs().max()


@pytest.mark.parametrize("prediction_type", KINDS)
def test_lcm_is_diffusers_with_the_evenly_spaced_timesteps_named(prediction_type: str, tmp_path: Path) -> None:
    """Of a teacher, and of a student whose own timesteps are others."""
    times, noises = [999, 749, 499, 249], torch.randn(4, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = LCMScheduler(**BETAS, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(timesteps=times, original_inference_steps=1000)
    network, x, random = Optimal(prediction_type), noises[0], torch.Generator().manual_seed(0)
    torch.randn(1, 1, 4, 8, 8, generator=random)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(1), {}), t, x, generator=random).prev_sample
    model = LatentModel(TINY["sd"](tmp_path))
    denoiser = Denoiser(network, VP(DDIMScheduler(**BETAS).alphas_cumprod), KINDS[prediction_type])
    for timesteps in ([999.0], [999.0, 5.0]):
        student = model.student(denoiser, timesteps)
        torch.testing.assert_close(sample(student, Sampler("lcm", 4), noises, {}), x, rtol=1e-4, atol=1e-4)
    assert Sampler("lcm", 4).num_noises == 4


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


@pytest.mark.parametrize("kind", ["dpm++", "unipc"])
def test_multistep_samplers_reach_the_data_and_want_betas(kind: str) -> None:
    """The flow of Gaussian data is linear: noise n ends at MEAN + STD n, but for the signal that is there at T-1."""
    ours = solve(Denoiser(Optimal("epsilon"), VP.scaled_linear(), eps), kind, 50, noise())
    assert (ours - (MEAN + STD * noise())).abs().max() < 0.08  # noise up to 3; the rest is the error of 50 steps
    with pytest.raises(UserError, match=rf"sampler {kind.replace('+', '.')}: is for text-to-image models"):
        solve(Denoiser(Optimal("epsilon"), EDM(), eps), kind, 4, noise())


def test_the_betas_are_diffusers() -> None:
    theirs = DDIMScheduler(**BETAS).betas.double()
    assert torch.allclose(VP.scaled_linear().betas, theirs, rtol=1e-5, atol=0)
    betas = torch.tensor([0.1, 0.5, 0.25], dtype=torch.float64)
    assert torch.allclose(VP(torch.tensor([0.9, 0.45, 0.3375])).betas, betas, rtol=1e-6)


# --- a teacher of text-to-image --------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tmp_path: Path) -> LatentModel:
    return LatentModel(TINY["sd"](tmp_path))


def test_its_sampler_is_fifty_steps_of_ddim(teacher: LatentModel) -> None:
    assert default_sampler(teacher) == Sampler("ddim", 50)
    assert default_sampler(teacher.student(teacher.denoiser, [999, 499])) == Sampler("student", 2)


def test_guidance_is_diffusers_on_the_raw_network(teacher: LatentModel) -> None:
    condition, null, scheduler = teacher.text_condition(["cat"]), teacher.null_condition, scheduler_of("euler", 3)
    first = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x = first[0] * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            without, with_text = (teacher.network(scaled, t, each["text"]).sample for each in (null, condition))
            x = scheduler.step(without + 8 * (with_text - without), t, x).prev_sample
    ours = sample(teacher, Sampler("euler", 3, 8.0), first, condition)
    assert (ours - x).abs().max() < 1e-5 * x.abs().max()


@pytest.mark.parametrize("kind", ["ddim", "heun", "dpm++", "unipc"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_nfe_counts_guidance_twice(teacher: LatentModel, kind: str, scale: float) -> None:
    """Per image: guidance asks the network for twice the batch, and changes what is drawn."""
    rows = []
    teacher.network.register_forward_pre_hook(lambda m, args, kw: rows.append(len(args[0])), with_kwargs=True)
    sampler = Sampler(kind, 3, scale)
    images = generate(teacher, sampler, range(2), asked=["cat", "dog"])
    assert sum(rows) == 2 * sampler.nfe
    assert sampler.nfe == (5 if kind == "heun" else 3) * (1 if scale == 1 else 2)
    assert not torch.equal(generate(teacher, Sampler(kind, 3, 8.0), range(2), asked=["cat", "dog"]), images)
