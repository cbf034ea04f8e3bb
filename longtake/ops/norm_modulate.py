"""Layer normalization followed by the shift and scale of adaptive conditioning."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def norm_modulate_reference(
    x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float = 1e-6
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in plain torch."""
    return F.layer_norm(x_BND, x_BND.shape[-1:], eps=eps) * (1 + scale_B1D) + shift_B1D


def norm_modulate(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, with the shape and dtype of x.

    The norm has no weights of its own and its statistics are float32 for half-precision x. Tokens
    may have any number of dimensions (x_BTSD); shift and scale only need to broadcast against them.

    Source: Peebles and Xie, "Scalable diffusion models with transformers", arXiv:2212.09748.
    """
    return norm_modulate_reference(x_BND, shift_B1D, scale_B1D, eps)
