"""x0 out of every prediction type, against diffusers' schedulers and EDM's table."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from stub_networks import draw, relative_error

from fewstep.diffusion import parameterizations
from fewstep.diffusion.schedules import EDM, VP, Flow, broadcast

TIMES = [0, 20, 249, 499, 749, 999]
X_T, OUTPUT = draw(1, 3, 4, 4), draw(1, 3, 4, 4, seed=1)


def predicted_x0(parameterization, schedule, x_t, output, t):
    c_skip, c_out, _ = (broadcast(c, x_t) for c in parameterization(*schedule.alpha_sigma(t)))
    return c_skip * x_t + c_out * output


def ddim(prediction_type: str) -> DDIMScheduler:
    """diffusers' scheduler with its products of alphas in float64."""
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.alphas_cumprod = VP.scaled_linear().alphas_cumprod
    scheduler.set_timesteps(1000)
    return scheduler


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize(
    ("parameterization", "prediction_type"),
    [
        (parameterizations.eps, "epsilon"),
        (parameterizations.v, "v_prediction"),
        (parameterizations.x0, "sample"),
    ],
    ids=["eps", "v", "x0"],
)
def test_x0_equals_diffusers_for_vp(parameterization, prediction_type, t):
    reference = ddim(prediction_type).step(OUTPUT, t, X_T).pred_original_sample
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
    assert relative_error(predicted_x0(edm, EDM(), X_T, OUTPUT, t), reference) < 1e-10
    _, _, c_in = edm(*EDM().alpha_sigma(t))
    assert relative_error(c_in * X_T, scheduler.precondition_inputs(X_T, t[0])) < 1e-10


@pytest.mark.parametrize("sigma_data", [0.5, 0.75])
@pytest.mark.parametrize("sigma", [0.002, 0.17, 2.53, 80.0])
def test_edm_preconditioning_equals_the_papers_table(sigma, sigma_data):
    c_skip, c_out, c_in = parameterizations.edm(sigma_data)(*EDM().alpha_sigma(torch.tensor([sigma]).double()))
    total = sigma**2 + sigma_data**2
    assert c_skip.item() == pytest.approx(sigma_data**2 / total, rel=1e-6)
    assert c_out.item() == pytest.approx(sigma * sigma_data / total**0.5, rel=1e-6)
    assert c_in.item() == pytest.approx(1 / total**0.5, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.002, 0.17, 2.53, 80.0])
def test_edm_keeps_the_networks_input_and_target_at_unit_variance(sigma):
    """The reason for the table's entries (arXiv 2206.00364, appendix B.6), on data of that standard deviation."""
    x0, eps = 0.5 * draw(200_000), draw(200_000, seed=1)
    t = torch.tensor([sigma], dtype=torch.float64)
    x_t = EDM().add_noise(x0, eps, t)
    c_skip, c_out, c_in = parameterizations.edm(0.5)(*EDM().alpha_sigma(t))
    assert (c_in * x_t).std().item() == pytest.approx(1, abs=0.01)
    assert ((x0 - c_skip * x_t) / c_out).std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("t", TIMES)
def test_the_exact_eps_gives_the_exact_x0(t):
    x0, eps, schedule = draw(1, 4), draw(1, 4, seed=1), VP.scaled_linear()
    x_t = schedule.add_noise(x0, eps, torch.tensor([t]))
    assert relative_error(predicted_x0(parameterizations.eps, schedule, x_t, eps, torch.tensor([t])), x0) < 1e-10


@pytest.mark.parametrize("t", TIMES)
def test_diffusers_velocity_gives_the_exact_x0(t):
    scheduler, schedule = DDPMScheduler(), VP.scaled_linear()
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    x0, eps, times = draw(1, 4), draw(1, 4, seed=1), torch.tensor([t])
    x_t, velocity = schedule.add_noise(x0, eps, times), scheduler.get_velocity(x0, eps, times)
    assert relative_error(predicted_x0(parameterizations.v, schedule, x_t, velocity, times), x0) < 1e-10


def test_v_prediction_is_finite_at_zero_terminal_snr():
    """There eps carries no information about x0; v is -x0."""
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False)
    scheduler.set_timesteps(1000)
    value = predicted_x0(parameterizations.v, VP(scheduler.alphas_cumprod), X_T, OUTPUT, torch.tensor([999]))
    assert relative_error(value, scheduler.step(OUTPUT, 999, X_T).pred_original_sample) < 1e-6
    assert relative_error(value, -OUTPUT) < 1e-6


@pytest.mark.parametrize("t", [0.001, 0.5, 1.0])
def test_the_exact_flow_velocity_gives_the_exact_x0(t):
    x0, eps, times = draw(1, 4), draw(1, 4, seed=1), torch.tensor([t])
    x_t = Flow().add_noise(x0, eps, times)
    assert relative_error(predicted_x0(parameterizations.flow, Flow(), x_t, eps - x0, times), x0) < 1e-10


@pytest.mark.parametrize("name", ["eps", "v", "x0", "flow"])
def test_only_edm_scales_the_networks_input(name):
    _, _, c_in = getattr(parameterizations, name)(*VP.scaled_linear().alpha_sigma(torch.tensor(TIMES)))
    assert torch.equal(c_in, torch.ones(len(TIMES), dtype=torch.float64))
