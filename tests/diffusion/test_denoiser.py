"""The denoiser's formula, and guidance as a denoiser."""

import pytest
import torch
from diffusers import DDIMScheduler
from stub_networks import SmoothNetwork, draw, kinds, relative_error, vp_scheduler

from fewstep.diffusion.denoiser import Denoiser, Guided
from fewstep.diffusion.parameterizations import edm, eps
from fewstep.diffusion.schedules import EDM, VP

LABEL = {"label": torch.tensor([0.3, -0.2])}
NULL = {"label": torch.tensor([0.9])}
X_T, T = draw(2, 3, 4, 4), torch.tensor([249, 749])


def vp_denoiser(parameterization=eps) -> Denoiser:
    return Denoiser(SmoothNetwork(), VP.scaled_linear(), parameterization)


def test_the_network_sees_the_scaled_input_and_native_time():
    network, t = SmoothNetwork(), torch.tensor([0.3, 40.0], dtype=torch.float64)
    x0 = Denoiser(network, EDM(), edm(0.5))(X_T, t, LABEL)
    scale = (t**2 + 0.25).sqrt().reshape(2, 1, 1, 1)
    [(seen, seen_t, seen_condition)] = network.calls
    assert relative_error(seen, X_T / scale) < 1e-10
    assert torch.equal(seen_t, t)
    assert seen_condition == LABEL
    skip, out = 0.25 / scale**2, t.reshape(2, 1, 1, 1) * 0.5 / scale
    assert relative_error(x0, skip * X_T + out * network(X_T / scale, t, LABEL)) < 1e-10


def test_the_prediction_has_the_dtype_of_its_input_whatever_the_network_computes_in():
    denoiser = vp_denoiser()
    denoiser.network.register_forward_hook(lambda module, args, output: output.double())
    assert denoiser(X_T.float(), T, LABEL).dtype == torch.float32


def test_coefficients_are_not_rounded_to_the_networks_precision():
    """At t = 999 an eps model's x0 is amplified 14.6 times; float32 coefficients would cost three digits."""
    c_skip, c_out, _ = vp_denoiser().coefficients(torch.tensor([999]))
    abar = VP.scaled_linear().alphas_cumprod[999].item()
    assert c_skip.item() == pytest.approx(abar**-0.5, rel=1e-14)
    assert c_out.item() == pytest.approx(-((1 / abar - 1) ** 0.5), rel=1e-14)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.75, 8.0])
@kinds
def test_guiding_x0_is_guiding_what_the_network_predicts(parameterization, prediction_type, scale):
    """The reference guides eps, v or the sample in the network's output, as diffusers' pipelines do."""
    denoiser = vp_denoiser(parameterization)
    guided = Guided(denoiser, scale, NULL)(X_T, T, LABEL)
    conditional = denoiser.network(X_T, T, LABEL)
    null = denoiser.network(X_T, T, {"label": NULL["label"].expand(2)})
    scheduler = vp_scheduler(DDIMScheduler, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    output = null + scale * (conditional - null)
    reference = [scheduler.step(output[[i]], T[i], X_T[[i]]).pred_original_sample for i in range(2)]
    assert relative_error(guided, torch.cat(reference)) < 1e-10


def test_guidance_is_one_call_of_twice_the_batch():
    denoiser = vp_denoiser()
    Guided(denoiser, 3.0, NULL)(X_T, T, LABEL)
    [(x, t, condition)] = denoiser.network.calls
    assert torch.equal(x, torch.cat([X_T, X_T]))
    assert torch.equal(t, torch.cat([T, T]))
    assert torch.equal(condition["label"], torch.tensor([0.9, 0.9, 0.3, -0.2]))


def test_keys_that_the_null_condition_lacks_are_the_conditions_own():
    """SDXL's time_ids are the same with and without the prompt."""
    denoiser, time_ids = vp_denoiser(), torch.tensor([0.1, -0.4])
    guided = Guided(denoiser, 2.0, NULL)(X_T, T, {**LABEL, "time_ids": time_ids})
    conditional = denoiser(X_T, T, {**LABEL, "time_ids": time_ids})
    null = denoiser(X_T, T, {"label": NULL["label"].expand(2), "time_ids": time_ids})
    assert relative_error(guided, null + 2 * (conditional - null)) < 1e-10
