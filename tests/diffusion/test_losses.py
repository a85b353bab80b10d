"""One denoising loss for every teacher, the distribution-matching gradient, the GAN pair."""

import pytest
import torch
from diffusers import DDPMScheduler
from stub_networks import SmoothNetwork, draw, relative_error
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from fewstep.diffusion import parameterizations
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.losses import denoising_loss, dmd_loss, gan_critic_loss, gan_student_loss
from fewstep.diffusion.schedules import EDM, VP, Flow

SHAPE = (4, 3, 4, 4)
X0, EPS = 0.5 * draw(*SHAPE), draw(*SHAPE, seed=1)
VP_TIMES = torch.tensor([20, 249, 749, 999])
SIGMAS = torch.tensor([0.002, 0.17, 2.53, 80.0], dtype=torch.float64)


def loss_and_output(schedule, parameterization, t):
    """The loss, what the network itself answered, and the denoiser's x0."""
    denoiser = Denoiser(SmoothNetwork(), schedule, parameterization)
    x_t = schedule.add_noise(X0, EPS, t)
    _, c_out, c_in = denoiser.coefficients(t)
    x0_hat = denoiser(x_t, t, {})
    output = denoiser.network(c_in.reshape(-1, 1, 1, 1) * x_t, t, {})
    return denoising_loss(x0_hat, X0, c_out).mean().item(), output, x0_hat


def test_the_loss_of_an_eps_model_is_the_mse_of_eps():
    """Also DMD2's critic loss for SD and SDXL."""
    loss, output, _ = loss_and_output(VP.scaled_linear(), parameterizations.eps, VP_TIMES)
    assert loss == pytest.approx(mse_loss(output, EPS).item(), rel=1e-10)


def test_the_loss_of_a_v_model_is_the_mse_of_diffusers_velocity():
    scheduler = DDPMScheduler()
    scheduler.alphas_cumprod = VP.scaled_linear().alphas_cumprod
    loss, output, _ = loss_and_output(VP.scaled_linear(), parameterizations.v, VP_TIMES)
    assert loss == pytest.approx(mse_loss(output, scheduler.get_velocity(X0, EPS, VP_TIMES)).item(), rel=1e-10)


def test_the_loss_of_a_flow_model_is_the_mse_of_the_velocity():
    loss, output, _ = loss_and_output(Flow(), parameterizations.flow, torch.tensor([0.01, 0.3, 0.7, 1.0]))
    assert loss == pytest.approx(mse_loss(output, EPS - X0).item(), rel=1e-10)


def test_the_loss_of_an_x0_model_is_the_mse_of_x0():
    loss, output, _ = loss_and_output(VP.scaled_linear(), parameterizations.x0, VP_TIMES)
    assert loss == pytest.approx(mse_loss(output, X0).item(), rel=1e-10)


@pytest.mark.parametrize("sigma_data", [0.5, 0.75])
def test_the_loss_of_an_edm_model_has_the_papers_weight(sigma_data):
    """lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (arXiv 2206.00364, table 1)."""
    loss, _, x0_hat = loss_and_output(EDM(), parameterizations.edm(sigma_data), SIGMAS)
    weight = (SIGMAS**2 + sigma_data**2) / (SIGMAS * sigma_data) ** 2
    reference = (weight.reshape(-1, 1, 1, 1) * (x0_hat - X0) ** 2).mean()
    assert loss == pytest.approx(reference.item(), rel=1e-10)


@pytest.mark.parametrize(("sigma", "weight"), [(80.0, 4.0), (0.002, 250_004.0)])
def test_the_loss_of_an_edm_critic_is_the_official_one(sigma, weight):
    """(1/sigma^2 + 1/sigma_data^2) (D - x)^2 (spec, 1.3), with its known weights at both ends."""
    t = torch.full((4,), sigma, dtype=torch.float64)
    loss, _, x0_hat = loss_and_output(EDM(), parameterizations.edm(0.5), t)
    reference = (sigma**-2 + 0.5**-2) * mse_loss(x0_hat, X0).item()
    assert loss == pytest.approx(reference, rel=1e-10)
    assert loss / mse_loss(x0_hat, X0).item() == pytest.approx(weight, rel=1e-4)


def dmd_gradient(fake, teacher_x0, critic_x0):
    fake = fake.clone().requires_grad_()
    return torch.autograd.grad(dmd_loss(fake, teacher_x0, critic_x0).mean(), fake)[0]


def test_the_gradient_of_the_dmd_loss_is_the_papers():
    """g / (B D), g = (critic - teacher) / mean|fake - teacher| with the mean over each sample."""
    fake, teacher, critic = draw(*SHAPE), draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)
    fake = fake * torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    distance = torch.stack([(fake[i] - teacher[i]).abs().mean() for i in range(4)])
    expected = (critic - teacher) / distance.reshape(-1, 1, 1, 1) / (4 * 48)
    assert relative_error(dmd_gradient(fake, teacher, critic), expected) < 1e-10


def test_the_dmd_loss_is_half_the_mean_square_of_its_direction():
    fake, teacher, critic = draw(*SHAPE), draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)
    direction = dmd_gradient(fake, teacher, critic) * fake.numel()
    expected = direction.square().mean(dim=(1, 2, 3)) / 2  # (B,)
    torch.testing.assert_close(dmd_loss(fake, teacher, critic), expected, rtol=1e-10, atol=0)


def test_descending_the_dmd_loss_moves_from_the_critic_to_the_teacher():
    fake, teacher, critic = draw(*SHAPE), draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)
    step = -dmd_gradient(fake, teacher, critic)
    assert torch.nn.functional.cosine_similarity(step.flatten(1), (teacher - critic).flatten(1)).min() > 1 - 1e-12


def test_the_dmd_gradient_vanishes_where_teacher_equals_critic():
    fake, teacher = draw(*SHAPE), draw(*SHAPE, seed=1)
    critic = torch.cat([teacher[:2], draw(2, *SHAPE[1:], seed=2)])
    gradient = dmd_gradient(fake, teacher, critic)
    assert gradient[:2].abs().max() < 1e-14
    assert gradient[2:].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [0.0, 1e-12])
def test_the_dmd_gradient_is_bounded_where_fake_equals_the_teachers_prediction(dtype, distance):
    teacher, critic = draw(*SHAPE).to(dtype), draw(*SHAPE, seed=1).to(dtype)
    gradient = dmd_gradient(teacher + distance, teacher, critic)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() <= 1.01e5 * (critic - teacher).abs().max() / gradient.numel()
    assert gradient.abs().max() > 0


def test_the_dmd_gradient_is_zero_where_all_three_agree():
    assert torch.equal(dmd_gradient(X0, X0, X0), torch.zeros_like(X0))


def test_the_dmd_loss_teaches_neither_teacher_nor_critic():
    fake, teacher, critic = (draw(*SHAPE, seed=i).requires_grad_() for i in range(3))
    dmd_loss(fake, teacher, critic).sum().backward()
    assert fake.grad is not None
    assert (teacher.grad, critic.grad) == (None, None)


LOGITS = pytest.mark.parametrize("scale", [1.0, 200.0])


@LOGITS
def test_the_students_gan_loss_calls_its_fakes_real(scale):
    logits = scale * draw(16)
    reference = binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none")
    torch.testing.assert_close(gan_student_loss(logits), reference, rtol=1e-8, atol=1e-12)


@LOGITS
def test_the_critics_gan_loss_tells_fakes_from_reals(scale):
    fake, real = scale * draw(16), scale * draw(16, seed=1)
    fakes = binary_cross_entropy_with_logits(fake, torch.zeros_like(fake), reduction="none")
    reals = binary_cross_entropy_with_logits(real, torch.ones_like(real), reduction="none")
    torch.testing.assert_close(gan_critic_loss(fake, real), fakes + reals, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["teacher", "critic", "both"])
def test_a_sample_that_is_not_finite_is_left_out_and_the_others_are_as_they_were(where, value):
    """As the official code's nan_to_num has it: g is zero there, and the mean stays one over the whole batch."""
    fake, teacher, critic = draw(*SHAPE), draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)
    expected = (critic - teacher) / (fake - teacher).abs().mean(dim=(1, 2, 3), keepdim=True) / fake.numel()
    expected[2] = 0
    losses = dmd_loss(fake, teacher, critic)
    for prediction in {"teacher": [teacher], "critic": [critic], "both": [teacher, critic]}[where]:
        prediction[2, 0, 1, 1] = value
    assert relative_error(dmd_gradient(fake, teacher, critic), expected) < 1e-10
    assert torch.equal(dmd_gradient(fake, teacher, critic)[2], torch.zeros(SHAPE[1:], dtype=torch.float64))
    kept = torch.tensor([1.0, 1, 0, 1], dtype=torch.float64)
    assert torch.equal(dmd_loss(fake, teacher, critic), losses * kept)


def test_a_fake_that_is_not_finite_is_not_hidden():
    """Its own gradients would not be either: the update has to be skipped."""
    fake = draw(*SHAPE)
    fake[2, 0, 1, 1] = float("nan")
    assert dmd_loss(fake, draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)).isfinite().tolist() == [True, True, False, True]
