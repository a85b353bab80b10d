"""Where to train: distributions; where to step: grids."""

import math
from functools import partial

import pytest
import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler

from fewstep.diffusion import timesteps
from fewstep.diffusion.schedules import EDM
from fewstep.diffusion.timesteps import index_grid, karras_grid, shift_time, trailing_grid
from steps import draws

NUM = 200_000


@pytest.mark.parametrize(
    ("draw", "inverse", "mean", "std"),
    [
        (timesteps.lognormal_sigma, torch.log, -1.2, 1.2),
        (timesteps.lognormal_sigma, torch.log, 0.5, 0.7),
        (timesteps.logit_normal, torch.logit, 0.0, 1.0),
        (timesteps.logit_normal, torch.logit, 1.0, 0.5),
    ],
)
def test_normals_have_the_asked_moments(draw, inverse, mean, std):
    numbers = inverse(draw(draws(NUM), mean, std).double())
    assert numbers.mean().item() == pytest.approx(mean, abs=0.015)
    assert numbers.std().item() == pytest.approx(std, abs=0.015)


def test_lognormal_sigma_defaults_to_edms_training_distribution():
    """P_mean = -1.2, P_std = 1.2 (arXiv 2206.00364, table 1): half of all levels are under exp(-1.2)."""
    sigma = timesteps.lognormal_sigma(draws(NUM))
    assert (sigma < math.exp(-1.2)).float().mean().item() == pytest.approx(0.5, abs=0.005)
    assert (sigma < math.exp(0)).float().mean().item() == pytest.approx(0.8413, abs=0.005)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shifted_uniform_is_uniform_before_the_shift(shift):
    t = timesteps.shifted_uniform(draws(NUM), shift)
    uniform = t / (shift - (shift - 1) * t)  # the inverse of the shift
    quantiles = torch.quantile(uniform, torch.tensor([0.1, 0.5, 0.9]))
    assert quantiles.tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.01)


@pytest.mark.parametrize(("low", "high"), [(0, 999), (20, 980), (399, 399)])
def test_uniform_level_stays_in_its_range_and_reaches_both_ends(low, high):
    t = timesteps.uniform_level(draws(NUM), torch.arange(1000), low, high)
    assert (t.min().item(), t.max().item()) == (low, high)


def test_uniform_level_draws_every_level_equally_often():
    counts = torch.bincount(timesteps.uniform_level(draws(NUM), torch.arange(10), 2, 9), minlength=10)
    assert counts[:2].tolist() == [0, 0]
    assert counts[2:].tolist() == pytest.approx([NUM / 8] * 8, rel=0.03)


def test_uniform_level_is_uniform_over_karras_indices_for_edm():
    """Half of all draws are under sigma = 2.5 (spec, 1.3), far from uniform in sigma."""
    sigma = timesteps.uniform_level(draws(NUM), EDM().levels)
    assert (sigma < 2.5265).float().mean().item() == pytest.approx(0.5, abs=0.005)
    assert set(sigma.unique().tolist()) == set(EDM().levels.tolist())


SHIFTED, LEVEL = (
    partial(timesteps.shifted_uniform, shift=3.0),
    partial(timesteps.uniform_level, levels=torch.arange(1000)),
)


@pytest.mark.parametrize("draw", [timesteps.lognormal_sigma, timesteps.logit_normal, SHIFTED, LEVEL])
def test_times_are_a_function_of_the_generator_alone_and_differ_within_a_batch(draw):
    torch.manual_seed(98)
    first = draw(draws(8, seed=1))
    assert len(first.unique()) == 8
    torch.manual_seed(99)
    assert torch.equal(draw(draws(8, seed=1)), first)
    assert not torch.equal(draw(draws(8, seed=2)), first)


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_index_grid_has_exactly_as_many_entries_as_asked_and_equals_diffusers(num):
    scheduler = LCMScheduler(original_inference_steps=1000)
    scheduler.set_timesteps(num)
    assert len(index_grid(num)) == num
    assert torch.equal(index_grid(num), scheduler.timesteps)
    if num in (1, 2, 3, 4, 5, 8):  # for which the official list is right
        assert index_grid(num).tolist() == list(range(999, 0, -(1000 // num)))


@pytest.mark.parametrize(("num", "total"), [(1000, 1000), (7, 20), (20, 20)])
def test_index_grid_is_evenly_spaced_for_any_number_of_timesteps(num, total):
    gaps = index_grid(num, total).diff().neg()
    assert index_grid(num, total)[0] == total - 1
    assert index_grid(num, total)[-1] >= 0
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("num", [2, 4, 18, 1000])
@pytest.mark.parametrize("rho", [7.0, 3.0])
def test_karras_grid_equals_the_papers_equation(num, rho):
    step = [(80 ** (1 / rho) + i / (num - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(num)]
    assert karras_grid(num, rho=rho).tolist() == pytest.approx(step, rel=1e-10)


@pytest.mark.parametrize("num", [1, 2, 18])
def test_karras_grid_starts_at_sigma_max_exactly(num):
    assert karras_grid(num, 0.002, 77.7)[0].item() == 77.7


@pytest.mark.parametrize("shift", [2.0, 3.0])
def test_shifting_divides_the_signal_to_noise_ratio_by_the_shift(shift):
    """sigma / alpha grows by the factor `shift`, which is equation 23 of arXiv 2403.03206 with s = sqrt(m/n)."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    shifted = shift_time(t, shift)
    torch.testing.assert_close(shifted / (1 - shifted), shift * t / (1 - t), rtol=1e-10, atol=0)


def test_trailing_grid_is_diffusers_for_every_number_of_steps():
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    for num in range(1, 1001):
        scheduler.set_timesteps(num)
        ours, theirs = trailing_grid(num), scheduler.timesteps.long()
        assert torch.equal(ours, theirs[:num]), num
        assert len(ours) == num
        assert theirs[num:].tolist() in ([], [-1])  # theirs is longer by one for some
    assert all(torch.equal(trailing_grid(num), index_grid(num)) for num in (1, 2, 4, 5, 8, 50, 1000))
