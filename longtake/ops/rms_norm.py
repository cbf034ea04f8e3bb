"""Root-mean-square normalization of queries and keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x_BNAE: Tensor, weight_E: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in plain torch."""
    return F.rms_norm(x_BNAE, weight_E.shape, weight_E, eps)


def rms_norm(x_BNAE: Tensor, weight_E: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x.

    The mean is float32 for half-precision x.

    Source: Zhang and Sennrich, "Root mean square layer normalization", arXiv:1910.07467.
    """
    return rms_norm_reference(x_BNAE, weight_E, eps)
