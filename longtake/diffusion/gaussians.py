"""Divergence and likelihood of Gaussians, elementwise and in nats.

Source: Ho et al., arXiv:2006.11239, section 3.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl_divergence(
    mean: Tensor, log_variance: Tensor, of_mean: Tensor, of_log_variance: Tensor
) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(of_mean, exp(of_log_variance)))."""
    return 0.5 * (
        of_log_variance
        - log_variance
        - 1
        + (log_variance - of_log_variance).exp()
        + (mean - of_mean).square() * (-of_log_variance).exp()
    )


def discretized_log_likelihood(value: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability of the bin that holds `value`, for 8-bit data scaled to [-1, 1].

    Bins are 2/255 wide; the outermost two reach to infinity. Latents are not 8-bit data, but the
    public models were trained with this term, so it is kept as it is.
    """
    inverse_std = (-0.5 * log_variance).exp()
    cdf_above = _approximate_cdf((value - mean + 1 / 255) * inverse_std)
    cdf_below = _approximate_cdf((value - mean - 1 / 255) * inverse_std)
    probability = torch.where(
        value < -0.999,
        cdf_above,
        torch.where(value > 0.999, 1 - cdf_below, cdf_above - cdf_below),
    )
    return probability.clamp(min=1e-12).log()


def _approximate_cdf(x: Tensor) -> Tensor:
    """Of the standard normal, within 2e-4: the approximation the public models trained with."""
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
