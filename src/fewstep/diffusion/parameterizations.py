"""What a network predicts, as three coefficients: x0 = c_skip x_t + c_out F(c_in x_t, t, condition).

Each function takes alpha, sigma (B,) in float64 and returns c_skip, c_out, c_in (B,).
"""

from collections.abc import Callable

import torch
from torch import Tensor

Coefficients = tuple[Tensor, Tensor, Tensor]
Parameterization = Callable[[Tensor, Tensor], Coefficients]


def eps(alpha: Tensor, sigma: Tensor) -> Coefficients:
    """F predicts the noise: x0 = (x_t - sigma F) / alpha."""
    return 1 / alpha, -sigma / alpha, torch.ones_like(alpha)


def v(alpha: Tensor, sigma: Tensor) -> Coefficients:
    """F predicts alpha eps - sigma x0: x0 = alpha x_t - sigma F, where alpha^2 + sigma^2 = 1."""
    return alpha, -sigma, torch.ones_like(alpha)


def x0(alpha: Tensor, sigma: Tensor) -> Coefficients:
    """F predicts the clean sample."""
    return torch.zeros_like(alpha), torch.ones_like(alpha), torch.ones_like(alpha)


def flow(alpha: Tensor, sigma: Tensor) -> Coefficients:
    """F predicts eps - x0: x0 = x_t - sigma F, where alpha + sigma = 1."""
    return torch.ones_like(alpha), -sigma, torch.ones_like(alpha)


def edm(sigma_data: float = 0.5) -> Parameterization:
    """EDM's preconditioning for data of standard deviation `sigma_data` (arXiv 2206.00364, table 1)."""

    def coefficients(alpha: Tensor, sigma: Tensor) -> Coefficients:
        variance = sigma**2 + sigma_data**2  # of x_t, where alpha is 1
        return sigma_data**2 / variance, sigma * sigma_data / variance.sqrt(), 1 / variance.sqrt()

    return coefficients
