"""Schedules against diffusers' and against published constants."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from stub_networks import draw, relative_error, vp_scheduler

from fewstep.diffusion.schedules import EDM, VP, Flow, broadcast


@pytest.mark.parametrize(
    ("t", "abar"),
    [(999, 0.0046601), (980, 0.00584), (749, 0.05662), (499, 0.27767), (399, 0.42609), (249, 0.67543), (20, 0.98131)],
)
def test_stable_diffusion_keeps_the_known_amount_of_signal(t, abar):
    alpha, sigma = VP.scaled_linear().alpha_sigma(torch.tensor([t]))
    assert alpha.item() ** 2 == pytest.approx(abar, abs=6e-6)
    assert alpha.item() ** 2 + sigma.item() ** 2 == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize(
    ("index", "sigma"),
    [(0, 0.002), (20, 0.00323), (250, 0.170), (500, 2.53), (750, 17.6), (980, 72.05), (999, 80.0)],
)
def test_edm_levels_are_the_known_karras_sigmas_in_ascending_order(index, sigma):
    assert EDM().levels[index].item() == pytest.approx(sigma, rel=3e-3)


@pytest.mark.parametrize(("start", "end", "num"), [(0.00085, 0.012, 1000), (1e-4, 0.02, 100)])
def test_scaled_linear_equals_the_closed_form_in_float64_and_diffusers(start, end, num):
    abar = VP.scaled_linear(start, end, num).alphas_cumprod
    np.testing.assert_allclose(abar, np.cumprod(1 - np.linspace(start**0.5, end**0.5, num) ** 2), rtol=1e-12)
    theirs = DDPMScheduler(num, start, end, beta_schedule="scaled_linear").alphas_cumprod
    assert relative_error(abar, theirs) < 1e-6


@pytest.mark.parametrize("num", [18, 1000])
@pytest.mark.parametrize(("sigma_min", "sigma_max"), [(0.002, 80.0), (0.01, 50.0)])
def test_edm_levels_and_the_teachers_steps_equal_diffusers(sigma_min, sigma_max, num):
    scheduler, schedule = EDMEulerScheduler(sigma_min=sigma_min, sigma_max=sigma_max), EDM(sigma_min, sigma_max)
    scheduler.set_timesteps(num)
    grid = schedule.ode_grid(num)
    torch.testing.assert_close(grid, scheduler.sigmas[:-1].double(), rtol=1e-6, atol=0)
    assert (grid[0].item(), grid[-1].item()) == (sigma_max, pytest.approx(sigma_min, rel=1e-12))
    assert torch.equal(schedule.levels.flip(0), schedule.ode_grid(1000))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_equal_diffusers(shift):
    sigmas = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas
    torch.testing.assert_close(Flow(shift).levels.flip(0), sigmas.double(), rtol=1e-6, atol=0)


def test_noising_equals_diffusers():
    vp, edm, flow = vp_scheduler(DDPMScheduler), EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    x0, eps, t = draw(5, 3, 4, 4), draw(5, 3, 4, 4, seed=1), torch.tensor([0, 20, 399, 749, 999])
    edms, flows = torch.tensor([1, 300, 600, 800, 1000]), torch.tensor([0, 300, 600, 800, 999])
    for schedule, times, theirs in (
        (VP.scaled_linear(), t, vp.add_noise(x0, eps, t)),
        (EDM(), edm.sigmas[edms], edm.add_noise(x0, eps, edm.timesteps[edms])),
        (Flow(), flow.sigmas[flows], flow.scale_noise(x0, flow.timesteps[flows], eps)),
    ):
        assert relative_error(schedule.add_noise(x0, eps, times), theirs) < 1e-10


@pytest.mark.parametrize(
    ("schedule", "t"), [(EDM(), 3.0), (VP.scaled_linear(), 399), (Flow(), 0.3)], ids=["edm", "vp", "flow"]
)
def test_coefficients_are_float64_and_what_is_noised_keeps_its_dtype(schedule, t):
    times = torch.tensor([t], dtype=torch.float32)
    assert [c.dtype for c in schedule.alpha_sigma(times)] == [torch.float64, torch.float64]
    assert schedule.add_noise(torch.ones(1, 2), torch.ones(1, 2), times).dtype == torch.float32


def test_broadcast_multiplies_each_sample_by_its_own_coefficient():
    coefficient, x = torch.tensor([2.0, 3.0], dtype=torch.float64), torch.ones(2, 1, 2, 2)
    assert torch.equal((broadcast(coefficient, x) * x).sum((1, 2, 3)), torch.tensor([8.0, 12.0]))


@pytest.mark.parametrize(
    ("schedule", "factor"), [(EDM(), 80.0), (EDM(sigma_max=10.0), 10.0), (VP.scaled_linear(), 1.0), (Flow(), 1.0)]
)
def test_pure_noise_is_eps_and_of_edm_sigma_max_times_eps(schedule, factor):
    eps = draw(2, 3)
    assert torch.equal(schedule.pure_noise(eps), factor * eps)


@pytest.mark.parametrize(
    ("schedule", "grid"),
    [
        (VP.scaled_linear(), [999, 749, 499, 249]),
        (Flow(), [1.0, 0.75, 0.5, 0.25]),
        (EDM(), EDM().levels[[999, 749, 499, 249]].tolist()),
    ],
    ids=["vp", "flow", "edm"],
)
def test_a_student_steps_on_evenly_spaced_levels_by_default(schedule, grid):
    assert schedule.grid(4).tolist() == pytest.approx(grid, rel=1e-12)
    schedule.check_timesteps(schedule.grid(4))


@pytest.mark.parametrize(
    ("schedule", "timesteps", "complaint"),
    [
        (EDM(), [70.0, 1.0], "first must be sigma_max"),
        (EDM(), [80.0, 0.001], "between 0.002 and 80"),
        (EDM(), [90.0, 1.0], "between 0.002 and 80"),
        (VP.scaled_linear(), [999.0, 499.5], "integers"),
        (VP.scaled_linear(), [1000.0], "between 0 and 999"),
        (VP.scaled_linear(), [999.0, -1.0], "between 0 and 999"),
        (Flow(), [1.0, 0.0], "between 0.001 and 1"),
        (EDM(), [80.0, 2.5, 0.002], None),
        (EDM(0.01, 50), [50.0, 0.01], None),
        (VP.scaled_linear(), [399.0], None),
        (VP.scaled_linear(), [999.0, 0.0], None),
        (Flow(), [1.0, 0.5], None),
    ],
)
def test_times_that_a_student_cannot_step_at_are_refused_and_both_ends_accepted(schedule, timesteps, complaint):
    with pytest.raises(ValueError, match=complaint) if complaint else nullcontext():
        schedule.check_timesteps(torch.tensor(timesteps, dtype=torch.float64))
