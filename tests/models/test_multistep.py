"""DPM-Solver++ and UniPC against diffusers' own loops, on networks that predict eps and v; samplers of VP teachers."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.parameterizations import Parameterization, eps, v
from fewstep.diffusion.schedules import EDM, VP
from fewstep.errors import UserError
from fewstep.models.latent_model import LatentModel
from fewstep.models.sampler import Sampler, default_sampler, generate, multistep
from tiny_pipelines import TINY

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
KINDS = [(eps, "epsilon"), (v, "v_prediction")]
MEAN, STD = 0.4, 0.6


class Optimal(nn.Module):
    """What an optimal network predicts of data N(MEAN, STD^2), as eps or as v."""

    def __init__(self, prediction_type: str):
        super().__init__()
        self.prediction_type = prediction_type
        self.abar = DDIMScheduler(**SD_BETAS).alphas_cumprod.double()

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        abar = self.abar[t.long()].to(x.dtype).reshape(-1, 1, 1, 1)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        x0 = MEAN + alpha * STD**2 / (abar * STD**2 + 1 - abar) * (x - alpha * MEAN)
        noise = (x - alpha * x0) / sigma
        return noise if self.prediction_type == "epsilon" else alpha * noise - sigma * x0


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 20])
@pytest.mark.parametrize(("parameterization", "prediction_type"), KINDS, ids=["eps", "v"])
def test_multistep_samplers_are_diffusers(
    kind: str, num_steps: int, parameterization: Parameterization, prediction_type: str
) -> None:
    network = Optimal(prediction_type)
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = SCHEDULERS[kind](**SD_BETAS, prediction_type=prediction_type, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(3), {}), t, x).prev_sample
    denoiser = Denoiser(network, VP.scaled_linear(), parameterization)
    ours = multistep(denoiser, noise, Sampler(kind, num_steps), {})
    assert (ours - x).abs().max() < 1e-4 * x.abs().max()


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_multistep_samplers_reach_the_data(kind: str) -> None:
    """The flow of Gaussian data is linear: noise n ends at MEAN + STD n, but for the signal that is there at T-1."""
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(Optimal("epsilon"), VP.scaled_linear(), eps)
    ours = multistep(denoiser, noise, Sampler(kind, 50), {})
    assert (ours - (MEAN + STD * noise)).abs().max() < 0.08  # noise up to 3; the rest is the error of 50 steps


def test_the_betas_are_diffusers() -> None:
    theirs = DDIMScheduler(**SD_BETAS).betas.double()
    assert torch.allclose(VP.scaled_linear().betas, theirs, rtol=1e-5, atol=0)
    betas = torch.tensor([0.1, 0.5, 0.25], dtype=torch.float64)
    assert torch.allclose(VP(torch.tensor([0.9, 0.45, 0.3375])).betas, betas, rtol=1e-6)


def test_other_schedules_are_refused() -> None:
    denoiser = Denoiser(Optimal("epsilon"), EDM(), eps)
    with pytest.raises(UserError, match=r"sampler unipc: is for text-to-image models"):
        multistep(denoiser, torch.zeros(1, 2, 4, 4), Sampler("unipc", 4), {})


@pytest.fixture
def teacher(tmp_path: Path) -> LatentModel:
    return LatentModel(TINY["sd"](tmp_path))


def test_a_vp_teacher_is_sampled_by_fifty_steps_of_ddim(teacher: LatentModel) -> None:
    assert default_sampler(teacher) == Sampler("ddim", 50)
    teacher.timesteps = [999, 499]
    assert default_sampler(teacher) == Sampler("student", 2)


@pytest.mark.parametrize("kind", ["ddim", "heun", "dpm++", "unipc"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_nfe_counts_guidance_twice(teacher: LatentModel, kind: str, scale: float) -> None:
    """Per image: guidance asks the network for twice the batch."""
    rows = []
    handle = teacher.network.register_forward_pre_hook(lambda m, args, kw: rows.append(len(args[0])), with_kwargs=True)
    sampler = Sampler(kind, 3, scale)
    generate(teacher, sampler, range(2))
    handle.remove()
    assert sum(rows) == 2 * sampler.nfe
    assert sampler.nfe == (5 if kind == "heun" else 3) * (1 if scale == 1 else 2)


@pytest.mark.parametrize("kind", ["ddim", "unipc"])
def test_a_scale_changes_the_images(teacher: LatentModel, kind: str) -> None:
    plain, guided = (generate(teacher, Sampler(kind, 2, scale), range(2), asked=["cat", "dog"]) for scale in (1.0, 6.0))
    assert not torch.equal(plain, guided)
