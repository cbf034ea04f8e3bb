"""Shift, scale and gate as kernels read them: one row per sample."""

from __future__ import annotations

from torch import Tensor


def row_per_sample(row_B1D: Tensor, x_BND: Tensor) -> Tensor:
    """(B, D) from (B, 1, D), (B, 1, 1, D), ... beside tokens x of any number of dimensions.

    Raises ValueError if it is not one row per sample.
    """
    batch_size, hidden_size = x_BND.shape[0], x_BND.shape[-1]
    expected = (batch_size, *(1,) * (x_BND.ndim - 2), hidden_size)
    if row_B1D.shape != expected:
        raise ValueError(
            f"shift, scale or gate of shape {tuple(row_B1D.shape)} beside tokens of "
            f"{tuple(x_BND.shape)}: expected one row per sample, {expected}"
        )
    return row_B1D.reshape(batch_size, hidden_size)
