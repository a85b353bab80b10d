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
MAX_LOGIT = 10.0  # of the discriminator, in ratios of densities: beyond, one sample would outweigh all others


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


def dmd_loss(fake: Tensor, teacher_x0: Tensor, critic_x0: Tensor, floor: float = 0.0, project: bool = False) -> Tensor:
    """Distribution matching (DMD2, equation 1): a loss whose mean has the gradient g / (B D) at `fake`, all (B, ...).

    g = (critic_x0 - teacher_x0) / max(floor, mean|fake - teacher_x0|), the mean per sample. The value, mean g^2 / 2,
    measures no progress. Where fake equals the teacher's prediction g is bounded, and zero where teacher equals critic.
    Samples whose g is not finite are left out: their g is zero. With `project` the numerator d goes without its part
    along the critic's error p = fake - critic_x0, d - <d, p> / (<p, p> + 1e-8) p (PDMD, arXiv 2609.35768).
    """
    with torch.no_grad():
        distance = (fake - teacher_x0).abs().flatten(1).mean(1).clamp_min(max(floor, MIN_DISTANCE))  # (B,)
        direction = critic_x0 - teacher_x0  # (B, ...)
        if project:
            error = fake - critic_x0
            along = (direction * error).flatten(1).sum(1) / (error.square().flatten(1).sum(1) + 1e-8)  # (B,)
            direction = direction - broadcast(along, fake) * error
        g = direction / broadcast(distance, fake)  # (B, ...)
        # One broken sample of the teacher's would make every weight of the student NaN.
        target = fake - without_samples(g, finite_samples(g))
    return (fake - target).square().flatten(1).mean(1) / 2


def divergence_weight(logits: Tensor, divergence: str) -> Tensor:
    """h(r) = r^2 f''(r), up to a factor, of the f-divergence that is minimised (arXiv 2502.15681); (B,).

    r = exp(logits), within e^10 and e^-10, is the ratio of real to fake by a discriminator of these logits (B,):
    rkl 1, kl r, js r / (1 + r), sf 1 / (1 + r), sh sqrt(r), neyman 1 / r, jf 1 + r.
    """
    r = logits.clamp(-MAX_LOGIT, MAX_LOGIT).exp()
    weights = {"rkl": r**0, "kl": r, "js": r / (1 + r), "sf": 1 / (1 + r), "sh": r.sqrt(), "neyman": 1 / r, "jf": 1 + r}
    return weights[divergence]


def approximate_r1_loss(real_logits: Tensor, noised_logits: Tensor) -> Tensor:
    """(D(x) - D(x + noise))^2 of reals, in place of R1's squared gradient (APT, arXiv 2501.08316)."""
    return (real_logits - noised_logits).square()


def gan_student_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating: softplus(-logits of fakes)."""
    return softplus(-fake_logits)  # -log of the probability that the head gives "real"


def gan_fake_loss(fake_logits: Tensor) -> Tensor:
    """The critic's half of the GAN on fakes: softplus(logits)."""
    return softplus(fake_logits)


def gan_real_loss(real_logits: Tensor) -> Tensor:
    """The critic's half of the GAN on reals: softplus(-logits)."""
    return softplus(-real_logits)
