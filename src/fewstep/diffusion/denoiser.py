"""A denoiser is a network, a schedule and a parameterization; everything above sees only its x0 prediction."""

import torch
from torch import Tensor, nn

from fewstep.diffusion.parameterizations import Coefficients, Parameterization
from fewstep.diffusion.schedules import NoiseSchedule, broadcast

Condition = dict[str, Tensor]


class Denoiser(nn.Module):
    """x0 = c_skip x_t + c_out F(c_in x_t, t, condition), for x_t (B, ...), t (B,) and batch-first conditions.

    `network(x, t, condition)` takes native time; how it embeds it is the adapter's business.
    """

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, parameterization: Parameterization):
        super().__init__()
        self.network, self.schedule, self.parameterization = network, schedule, parameterization

    def coefficients(self, t: Tensor) -> Coefficients:
        """c_skip, c_out, c_in in float64, each (B,)."""
        return self.parameterization(*self.schedule.alpha_sigma(t))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The prediction of x0, in the dtype and shape of x_t."""
        c_skip, c_out, c_in = (broadcast(c, x_t) for c in self.coefficients(t))  # (B, 1, 1, 1)
        return c_skip * x_t + c_out * self.run(self.network, c_in * x_t, t, condition).to(x_t.dtype)

    def run(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """F(x, t, condition) by the denoiser's network, or by a view of it that ends early."""
        prediction: Tensor = network(x, t, condition)
        return prediction


class Guided(nn.Module):
    """Classifier-free guidance, itself a denoiser: x0 = x0_null + scale (x0_cond - x0_null), in one batch of 2B.

    Guidance is linear, so guiding x0 is guiding eps or v; scale 1 is no guidance (diffusers' convention).
    `null_condition` holds (1, ...) tensors; keys that it lacks (SDXL's time_ids) are the condition's own.
    """

    def __init__(self, denoiser: Denoiser, scale: float, null_condition: Condition):
        super().__init__()
        self.denoiser, self.scale, self.null_condition = denoiser, scale, null_condition

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.guide(*self.halves(x_t, t, condition))

    def halves(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """x0_null and x0_cond, each (B, ...), from the one pass."""
        null = {key: value.expand(len(x_t), *value.shape[1:]) for key, value in self.null_condition.items()}  # (B, ...)
        # (2B, ...), in one pass, null first, as in diffusers
        both = {key: torch.cat([null.get(key, value), value]) for key, value in condition.items()}
        x0_null, x0_cond = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return x0_null, x0_cond

    def guide(self, x0_null: Tensor, x0_cond: Tensor) -> Tensor:
        """The guided x0 of its halves."""
        return x0_null + self.scale * (x0_cond - x0_null)


def unguided(denoiser: Denoiser | Guided) -> Denoiser:
    """The denoiser that is guided, or that is not."""
    return denoiser.denoiser if isinstance(denoiser, Guided) else denoiser
