"""The end of every branch of a block: its output joins the residual stream through a gate."""

from __future__ import annotations

from torch import Tensor


def gated_residual_reference(x_BND: Tensor, gate_B1D: Tensor, y_BND: Tensor) -> Tensor:
    """x + gate * y in plain torch."""
    return x_BND + gate_B1D * y_BND


def gated_residual(x_BND: Tensor, gate_B1D: Tensor, y_BND: Tensor) -> Tensor:
    """x + gate * y, with the shape and dtype of x; also x_BTSD with gate_B11D."""
    return gated_residual_reference(x_BND, gate_B1D, y_BND)
