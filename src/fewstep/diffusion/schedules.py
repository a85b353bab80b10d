"""Noise schedules: how much signal and how much noise x_t holds at a native time t.

    x_t = alpha(t) x0 + sigma(t) eps,    eps ~ N(0, I)

`t` is native time: only its own schedule may do arithmetic on it.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fewstep.diffusion.timesteps import index_grid, karras_grid, shift_time


def broadcast(coefficient: Tensor, x: Tensor) -> Tensor:
    """A per-sample coefficient (B,) in the dtype of `x` (B, ...) and shaped to multiply it."""
    return coefficient.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


class NoiseSchedule(ABC):
    """alpha(t), sigma(t) and what pure noise is; coefficients are float64 (SD at t=999 amplifies errors 14.6 times).

    `levels` (T,) are the native times, ascending in noise, that indices speak of: 20..980 of them train the student.
    """

    levels: Tensor
    kind: str
    """Which samplers fit: "edm", "vp" or "flow"."""
    betas: Tensor | None = None
    """(T,) float64, for samplers that start from those, where there are any."""
    distributions: tuple[str, ...] = ("index",)
    """The named distributions of `NoiseLevels` whose draws are native times of this schedule."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t) in float64, both (B,), for native times t (B,)."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps; x0, eps (B, ...), t (B,)."""
        alpha, sigma = self.alpha_sigma(t)
        return broadcast(alpha, x0) * x0 + broadcast(sigma, x0) * eps

    def pure_noise(self, eps: Tensor) -> Tensor:
        """What a sampler starts from: eps itself, whatever time the first step is conditioned on.

        One-step SDXL feeds unit noise at t=399 (DMD2, section 5.2): only conditioning and output scaling change.
        """
        return eps

    def grid(self, num: int) -> Tensor:
        """Where a student steps by default, and a teacher's DDIM: evenly spaced levels, noisiest first; (num,)."""
        return self.levels[index_grid(num, len(self.levels))]

    def ode_grid(self, num: int) -> Tensor:
        """Where the teacher's Heun sampler steps; (num,)."""
        return self.grid(num)

    def check_timesteps(self, timesteps: Tensor) -> None:
        """Raises ValueError if a student can't step at these native times (K,)."""
        low, high = self.levels[0].item(), self.levels[-1].item()
        if timesteps.min() < low or timesteps.max() > high:
            raise ValueError(f"{timesteps.tolist()} must lie between {low:g} and {high:g}")


class EDM(NoiseSchedule):
    """alpha = 1, sigma = t: native time is the noise level itself (Karras et al. 2022, arXiv 2206.00364)."""

    kind = "edm"
    distributions = ("index", "lognormal")

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.levels = karras_grid(1000, sigma_min, sigma_max).flip(0)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.double()
        return torch.ones_like(sigma), sigma

    def pure_noise(self, eps: Tensor) -> Tensor:
        """sigma_max * eps: at sigma_max the signal is negligible."""
        return self.sigma_max * eps

    def ode_grid(self, num: int) -> Tensor:
        """Karras' levels down to sigma_min."""
        return karras_grid(num, self.sigma_min, self.sigma_max)

    def check_timesteps(self, timesteps: Tensor) -> None:
        """The first must be sigma_max: the input there is sigma_max * eps, whatever the time says."""
        super().check_timesteps(timesteps)
        if timesteps[0] != self.sigma_max:
            raise ValueError(f"the first must be sigma_max = {self.sigma_max:g}, not {timesteps[0].item():g}")


class VP(NoiseSchedule):
    """alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t) at integer t = 0 .. T-1 (DDPM, Stable Diffusion, SDXL)."""

    kind = "vp"

    def __init__(self, alphas_cumprod: Tensor):
        self.alphas_cumprod = alphas_cumprod.double()  # (T,)
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas_cumprod / before  # beta_t = 1 - abar_t / abar_(t-1)
        self.levels = torch.arange(len(alphas_cumprod))
        self._by_device: dict[torch.device, Tensor] = {}

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_timesteps: int = 1000) -> "VP":
        """The schedule of SD 1.x, 2.x and SDXL: sqrt(beta) evenly spaced."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
        return cls(torch.cumprod(1 - betas, dim=0))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # Kept by device: a copy in every call would make the host wait.
        if t.device not in self._by_device:
            self._by_device[t.device] = self.alphas_cumprod.to(t.device)
        abar = self._by_device[t.device][t.long()]
        return abar.sqrt(), (1 - abar).sqrt()

    def check_timesteps(self, timesteps: Tensor) -> None:
        """They must be integers."""
        super().check_timesteps(timesteps)
        if (timesteps != timesteps.round()).any():
            raise ValueError(f"{timesteps.tolist()} must be integers")


class Flow(NoiseSchedule):
    """alpha = 1 - t, sigma = t for t in [0, 1] (rectified flow: SD3, FLUX, Sana); `shift` moves the levels to noise."""

    kind = "flow"
    distributions = ("index", "logit_normal", "shifted")

    def __init__(self, shift: float = 1.0):
        self.levels = shift_time(torch.arange(1, 1001, dtype=torch.float64) / 1000, shift)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.double()
        return 1 - sigma, sigma
