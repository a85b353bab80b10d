"""bfloat16, put on from outside: networks know nothing of it, and losses and schedules stay as they are."""

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.networks.copies import hold_copies

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INFERENCE_DTYPES = DTYPES | {"float16": torch.float16}


class AutocastDenoiser(Denoiser):
    """A denoiser that is trained: float32 weights, and a network that computes in bfloat16 in every pass.

    The weights that multiply have copies in bfloat16. Every pass opens its own autocast region, which keeps casts of
    the others: one that is cast without gradient, in a rollout, must not serve a pass with it. The coefficients and the
    prediction of x0 stay in float64 and float32.
    """

    def run(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        # Around the network alone: c_skip and c_out are float64, and x0 stays float32.
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().run(network, x, t, condition)


def trainable(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    """The denoiser, on the same weights, with a network that computes in `dtype` (float32 or bfloat16)."""
    if dtype == torch.float32:
        return denoiser
    hold_copies(denoiser.network)
    return AutocastDenoiser(denoiser.network, denoiser.schedule, denoiser.parameterization).train(denoiser.training)
