"""x0 out of every prediction type, against diffusers' schedulers and EDM's table."""

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from stub_networks import TIMES, draw, kinds, relative_error, targets, vp_scheduler

from fewstep.diffusion import parameterizations
from fewstep.diffusion.schedules import EDM, VP, Flow, broadcast

X_T, OUTPUT = draw(1, 3, 4, 4), draw(1, 3, 4, 4, seed=1)


def predicted_x0(parameterization, schedule, x_t, output, t):
    c_skip, c_out, _ = (broadcast(c, x_t) for c in parameterization(*schedule.alpha_sigma(t)))
    return c_skip * x_t + c_out * output


@pytest.mark.parametrize("t", TIMES.tolist())
@kinds
def test_x0_equals_diffusers_for_vp(parameterization, prediction_type, t):
    scheduler = vp_scheduler(DDIMScheduler, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    reference = scheduler.step(OUTPUT, t, X_T).pred_original_sample
    value = predicted_x0(parameterization, VP.scaled_linear(), X_T, OUTPUT, torch.tensor([t]))
    assert relative_error(value, reference) < 1e-10


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("index", [0, 500, 999])
def test_x0_equals_a_single_step_of_diffusers_to_zero_for_flow(index, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    t = scheduler.sigmas[index]
    scheduler.set_timesteps(sigmas=[Flow().levels[999 - index].item()])
    reference = scheduler.step(OUTPUT, scheduler.timesteps[0], X_T).prev_sample
    assert relative_error(predicted_x0(parameterizations.flow, Flow(), X_T, OUTPUT, t[None]), reference) < 1e-6


@pytest.mark.parametrize("sigma_data", [0.5, 0.75])
@pytest.mark.parametrize("sigma", [0.002, 0.17, 2.53, 80.0])
def test_edm_preconditioning_equals_diffusers(sigma, sigma_data):
    scheduler, t = EDMEulerScheduler(sigma_data=sigma_data), torch.tensor([sigma], dtype=torch.float64)
    edm = parameterizations.edm(sigma_data)
    reference = scheduler.precondition_outputs(X_T, OUTPUT, t[0])
    assert relative_error(predicted_x0(edm, EDM(), X_T, OUTPUT, t), reference) < 1e-13
    _, _, c_in = edm(*EDM().alpha_sigma(t))
    assert relative_error(c_in * X_T, scheduler.precondition_inputs(X_T, t[0])) < 1e-13


@targets
def test_what_a_network_should_predict_gives_the_exact_x0(schedule, parameterization, t, target):
    x0, noise = draw(len(t), 4), draw(len(t), 4, seed=1)
    value = predicted_x0(parameterization, schedule, schedule.add_noise(x0, noise, t), target(x0, noise), t)
    assert all(relative_error(*pair) < 1e-10 for pair in zip(value, x0, strict=True))
