"""One denoising loss for every teacher, the distribution-matching gradient, the GAN pair."""

import pytest
import torch
from stub_networks import SmoothNetwork, draw, relative_error, targets
from torch.nn.functional import binary_cross_entropy_with_logits

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.losses import (
    approximate_r1_loss,
    denoising_loss,
    divergence_weight,
    dmd_loss,
    gan_fake_loss,
    gan_real_loss,
    gan_student_loss,
)
from fewstep.diffusion.parameterizations import edm
from fewstep.diffusion.schedules import EDM

SHAPE = (4, 3, 4, 4)
FAKE, TEACHER, CRITIC = (draw(*SHAPE, seed=seed) for seed in range(3))
SIGMAS = torch.tensor([0.002, 0.17, 2.53, 80.0], dtype=torch.float64)


def mean_square(x):
    """(B, C, H, W) -> (B,)."""
    return x.square().mean(dim=(1, 2, 3))


def losses(schedule, parameterization, t):
    """The loss (B,), what the network itself answered, the error of the denoiser's x0, x0 and noise."""
    x0, noise = 0.5 * draw(len(t), *SHAPE[1:]), draw(len(t), *SHAPE[1:], seed=1)
    denoiser = Denoiser(SmoothNetwork(), schedule, parameterization)
    x0_hat = denoiser(schedule.add_noise(x0, noise, t), t, {})
    output = denoiser.network(*denoiser.network.calls[0])
    return denoising_loss(x0_hat, x0, denoiser.coefficients(t)[1]), output, x0_hat - x0, x0, noise


@targets
def test_the_loss_is_the_mse_of_what_the_network_predicts(schedule, parameterization, t, target):
    """Of eps it is DMD2's critic loss for SD and SDXL, too."""
    loss, output, _, x0, noise = losses(schedule, parameterization, t)
    torch.testing.assert_close(loss, mean_square(output - target(x0, noise)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("sigma_data", [0.5, 0.75])
def test_the_loss_of_an_edm_model_has_the_papers_weight_which_is_the_official_critics(sigma_data):
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM, table 1), or 1/sigma^2 + 1/sigma_data^2 (spec, 1.3)."""
    loss, _, error, _, _ = losses(EDM(), edm(sigma_data), SIGMAS)
    for weight in ((SIGMAS**2 + sigma_data**2) / (SIGMAS * sigma_data) ** 2, SIGMAS**-2 + sigma_data**-2):
        torch.testing.assert_close(loss, weight * mean_square(error), rtol=1e-10, atol=0)
    if sigma_data == 0.5:  # the known weights at both ends
        assert (loss / mean_square(error))[[-1, 0]].tolist() == pytest.approx([4.0, 250_004.0], rel=1e-4)


def dmd_gradient(fake, teacher_x0, critic_x0):
    fake = fake.clone().requires_grad_()
    return torch.autograd.grad(dmd_loss(fake, teacher_x0, critic_x0).mean(), fake)[0]


def test_the_dmd_loss_and_its_gradient_are_the_papers():
    """mean g^2 / 2 and g / (B D), g = (critic - teacher) / mean|fake - teacher| with the mean over each sample."""
    fake = FAKE * torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    distance = torch.stack([(fake[i] - TEACHER[i]).abs().mean() for i in range(4)])
    g = (CRITIC - TEACHER) / distance.reshape(-1, 1, 1, 1)
    assert relative_error(dmd_gradient(fake, TEACHER, CRITIC), g / (4 * 48)) < 1e-10
    torch.testing.assert_close(dmd_loss(fake, TEACHER, CRITIC), mean_square(g) / 2, rtol=1e-10, atol=0)


def test_the_dmd_gradient_vanishes_where_teacher_equals_critic():
    gradient = dmd_gradient(FAKE, TEACHER, torch.cat([TEACHER[:2], CRITIC[2:]]))
    assert gradient[:2].abs().max() < 1e-14
    assert gradient[2:].abs().min() > 0
    assert torch.equal(dmd_gradient(FAKE, FAKE, FAKE), torch.zeros(SHAPE, dtype=torch.float64))  # where all agree


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [0.0, 1e-12])
def test_the_dmd_gradient_is_bounded_where_fake_equals_the_teachers_prediction(dtype, distance):
    teacher, critic = draw(*SHAPE).to(dtype), draw(*SHAPE, seed=1).to(dtype)
    gradient = dmd_gradient(teacher + distance, teacher, critic)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() <= 1.01e5 * (critic - teacher).abs().max() / gradient.numel()
    assert gradient.abs().max() > 0


def test_a_floor_bounds_the_divisor_from_below_and_changes_no_other_sample():
    fake = TEACHER + torch.tensor([0.01, 0.09, 0.11, 1.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    g = (CRITIC - TEACHER) / torch.tensor([0.1, 0.1, 0.11, 1.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(dmd_loss(fake, TEACHER, CRITIC, floor=0.1), mean_square(g) / 2, rtol=1e-10, atol=0)


def test_a_projected_direction_has_no_part_along_the_critics_error_and_the_old_divisor():
    """Against Gram and Schmidt by a QR decomposition; what is taken out is the whole of the difference."""
    fake = FAKE.clone().requires_grad_()
    projected = torch.autograd.grad(dmd_loss(fake, TEACHER, CRITIC, project=True).mean(), fake)[0] * FAKE.numel()
    distance = (FAKE - TEACHER).abs().mean(dim=(1, 2, 3), keepdim=True)
    error, direction = (x.flatten(1) for x in (FAKE - CRITIC, (CRITIC - TEACHER) / distance))
    for found, along, whole in zip(projected.flatten(1), error, direction, strict=True):
        basis = torch.linalg.qr(torch.stack([along, whole], 1))[0]  # the second column: across the first
        expected = (whole @ basis[:, 1]) * basis[:, 1]
        assert (found @ along).abs() < 1e-9 * found.norm() * along.norm()
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


F = {  # the convex functions f(r), r = real / fake, of D_f = E_fake f(r); their weight is r^2 f''(r)
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "sf": lambda r: r * (1 + 1 / r).log() + (1 + 1 / r).log(),
    "sh": lambda r: -4 * r.sqrt(),
    "neyman": lambda r: 1 / (2 * r),
    "jf": lambda r: (r - 1) * r.log(),
}


@pytest.mark.parametrize("divergence", F)
def test_a_divergences_weight_is_r_squared_times_the_second_derivative_of_its_function(divergence):
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64)
    r = logits.exp().requires_grad_()
    first = torch.autograd.grad(F[divergence](r).sum(), r, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), r)[0]
    expected = (r.square() * second).detach()
    torch.testing.assert_close(divergence_weight(logits, divergence), expected, rtol=1e-9, atol=1e-12)


def test_the_softened_reverse_kl_is_what_js_leaves_of_it_and_ratios_are_clipped():
    logits = torch.tensor([-1e4, -10, 0.3, 10, 1e4], dtype=torch.float64)
    sf, js = (divergence_weight(logits, each) for each in ("sf", "js"))
    torch.testing.assert_close(sf + js, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(js, torch.sigmoid(logits.clamp(-10, 10)))
    assert divergence_weight(logits, "kl")[[0, -1]].tolist() == pytest.approx([4.54e-5, 22026.5], rel=1e-3)


def test_approximate_r1_goes_to_the_squared_gradient():
    """E (D(x + s e) - D(x))^2 / s^2 -> |grad D|^2 as s -> 0, by a function of known gradient."""
    x, s = draw(4000, 3), 1e-3
    known = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    logits = lambda points: (points @ known).tanh()  # noqa: E731
    at = torch.full_like(x, 0.2)
    slope = 1 - logits(at).square()
    found = approximate_r1_loss(logits(at), logits(at + s * x)).mean() / s**2
    assert found.item() == pytest.approx((slope[0].square() * known.square().sum()).item(), rel=0.1)


def test_the_dmd_loss_teaches_neither_teacher_nor_critic():
    fake, teacher, critic = (x.clone().requires_grad_() for x in (FAKE, TEACHER, CRITIC))
    dmd_loss(fake, teacher, critic).sum().backward()
    assert fake.grad is not None
    assert (teacher.grad, critic.grad) == (None, None)


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_the_gan_losses_are_cross_entropies(scale):
    """The student calls its fakes real, the critic tells fakes from reals."""
    fake, real = scale * draw(16), scale * draw(16, seed=1)
    fooled, fakes, reals = (
        binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth), reduction="none")
        for logits, truth in ((fake, 1.0), (fake, 0.0), (real, 1.0))
    )
    torch.testing.assert_close(gan_student_loss(fake), fooled, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(gan_fake_loss(fake), fakes, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(gan_real_loss(real), reals, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["teacher", "critic", "both"])
def test_a_sample_that_is_not_finite_is_left_out_and_the_others_are_as_they_were(where, value):
    """As the official code's nan_to_num has it: g is zero there, and the mean stays one over the whole batch."""
    fake, teacher, critic = FAKE, TEACHER.clone(), CRITIC.clone()
    expected = (critic - teacher) / (fake - teacher).abs().mean(dim=(1, 2, 3), keepdim=True) / fake.numel()
    expected[2] = 0
    whole = dmd_loss(fake, teacher, critic)
    for prediction in {"teacher": [teacher], "critic": [critic], "both": [teacher, critic]}[where]:
        prediction[2, 0, 1, 1] = value
    assert relative_error(dmd_gradient(fake, teacher, critic), expected) < 1e-10
    assert torch.equal(dmd_gradient(fake, teacher, critic)[2], torch.zeros(SHAPE[1:], dtype=torch.float64))
    kept = torch.tensor([1.0, 1, 0, 1], dtype=torch.float64)
    assert torch.equal(dmd_loss(fake, teacher, critic), whole * kept)


def test_a_fake_that_is_not_finite_is_not_hidden():
    """Its own gradients would not be either: the update has to be skipped."""
    fake = FAKE.clone()
    fake[2, 0, 1, 1] = float("nan")
    assert dmd_loss(fake, TEACHER, CRITIC).isfinite().tolist() == [True, True, False, True]
