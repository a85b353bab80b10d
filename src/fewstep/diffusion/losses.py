"""The losses of DMD2 (arXiv 2405.14867), as functions of predictions.

Every loss gives one number per sample (B,), whose mean over the batch is what is descended.

Convention about resolution: `denoising_loss` and `dmd_loss` are means over all D = C*H*W elements of a sample, the GAN
losses are one logit's; this is the official code's convention, so the published weights hold as they stand. It follows
that the gradient of `dmd_loss` at the image shrinks as 1/D and the GAN's does not: a GAN weight w tuned at D carries
over to D' as w * D / D' (3e-3 was tuned at D = 12,288).
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.diffusion.schedules import broadcast

# Below this mean distance (images are in [-1, 1]) the sample *is* the teacher's prediction: bounds |g| instead of inf.
MIN_DISTANCE = 1e-5


def finite_samples(x: Tensor) -> Tensor:
    """Which samples of x (B, ...) are finite throughout; (B,) bool."""
    return x.isfinite().flatten(1).all(1)


def without_samples(x: Tensor, kept: Tensor) -> Tensor:
    """x (B, ...) with zeros in place of the samples that are not `kept` (B,)."""
    return torch.where(kept.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def denoising_loss(x0_hat: Tensor, x0: Tensor, c_out: Tensor) -> Tensor:
    """mean ((x0_hat - x0) / c_out)^2, the MSE of what the network itself predicts; x0_hat, x0 (B, ...), c_out (B,).

    It equals eps-, v- and flow-MSE, EDM's weighted loss, and both critic losses of DMD2, by the parameterization.
    """
    return ((x0_hat - x0) / broadcast(c_out, x0)).square().flatten(1).mean(1)


def dmd_loss(fake: Tensor, teacher_x0: Tensor, critic_x0: Tensor) -> Tensor:
    """Distribution matching (DMD2, equation 1): a loss whose mean has the gradient g / (B D) at `fake`, all (B, ...).

    g = (critic_x0 - teacher_x0) / mean|fake - teacher_x0|, the mean per sample. The value, mean g^2 / 2, measures
    no progress. Where fake equals the teacher's prediction g is bounded, and zero where teacher equals critic. Samples
    whose g is not finite are left out: their g is zero.
    """
    with torch.no_grad():
        distance = (fake - teacher_x0).abs().flatten(1).mean(1).clamp_min(MIN_DISTANCE)  # (B,)
        g = (critic_x0 - teacher_x0) / broadcast(distance, fake)  # (B, ...)
        # One broken sample of the teacher's would make every weight of the student NaN.
        target = fake - without_samples(g, finite_samples(g))
    return (fake - target).square().flatten(1).mean(1) / 2


def gan_student_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating: softplus(-logits of fakes)."""
    return softplus(-fake_logits)  # -log of the probability that the head gives "real"


def gan_fake_loss(fake_logits: Tensor) -> Tensor:
    """The critic's half of the GAN on fakes: softplus(logits)."""
    return softplus(fake_logits)


def gan_real_loss(real_logits: Tensor) -> Tensor:
    """The critic's half of the GAN on reals: softplus(-logits)."""
    return softplus(-real_logits)
