"""The head of a modulated branch: norm, shift, scale and the linear layer that reads the result.

The normalized tokens exist only between two kernels, unless they are to be kept: the backward
computes them again in the pass that turns their gradient into the stream's. That costs one write,
and saves keeping a tensor of all tokens per branch. As in `carried_linear`, the stream goes through
the operation.

Letters: B batch, N tokens, D hidden size, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.ops.column_sum import column_sum
from longtake.ops.elementwise import picks_triton
from longtake.ops.norm_modulate import (
    norm_modulate_backward,
    norm_modulate_forward,
    norm_modulate_reference,
)
from longtake.ops.row_per_sample import row_per_sample
from longtake.ops.weight_gradient import weight_gradient


def modulated_linear_reference(
    x_BND: Tensor,
    shift_B1D: Tensor,
    scale_B1D: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(x, (LayerNorm(x) * (1 + scale) + shift) W^T + b) in plain torch."""
    h_BND = norm_modulate_reference(x_BND, shift_B1D, scale_B1D, eps)
    return x_BND, F.linear(h_BND, weight_OD, bias_O)


class _ModulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_BND: Tensor,
        shift_BD: Tensor,
        scale_BD: Tensor,
        weight_OD: Tensor,
        bias_O: Tensor,
        eps: float,
        recompute: bool,
    ) -> tuple[Tensor, Tensor]:
        h_BND, mean_BN, rstd_BN = norm_modulate_forward(x_BND, shift_BD, scale_BD, eps)
        kept_BND = None if recompute else h_BND
        ctx.save_for_backward(x_BND, mean_BN, rstd_BN, shift_BD, scale_BD, weight_OD, kept_BND)
        return x_BND.view_as(x_BND), F.linear(h_BND, weight_OD, bias_O)

    @staticmethod
    def backward(ctx, carried_BND: Tensor, dy_BNO: Tensor):
        x_BND, mean_BN, rstd_BN, shift_BD, scale_BD, weight_OD, kept_BND = ctx.saved_tensors
        dy_MO = dy_BNO.flatten(0, -2)
        dh_BND = (dy_MO @ weight_OD).view_as(x_BND)
        dx_BND, dshift_BD, dscale_BD, h_BND = norm_modulate_backward(
            dh_BND, x_BND, mean_BN, rstd_BN, shift_BD, scale_BD, carried_BND, kept_BND is None
        )
        h_BND = h_BND if kept_BND is None else kept_BND
        dweight_OD = weight_gradient(dy_MO, h_BND.flatten(0, -2))
        needs_bias = ctx.needs_input_grad[4]
        dbias_O = column_sum(dy_MO).to(weight_OD.dtype) if needs_bias else None
        dshift_BD, dscale_BD = dshift_BD.to(shift_BD.dtype), dscale_BD.to(scale_BD.dtype)
        return dx_BND, dshift_BD, dscale_BD, dweight_OD, dbias_O, None, None


def modulated_linear(
    x_BND: Tensor,
    shift_B1D: Tensor,
    scale_B1D: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor,
    eps: float = 1e-6,
    *,
    recompute: bool = True,
) -> tuple[Tensor, Tensor]:
    """(x, (LayerNorm(x) * (1 + scale) + shift) W^T + b); go on with the x returned.

    Tokens may have any number of dimensions (x_BTSD with shift_B11D); there is one row of shift and
    scale per sample. Without `recompute` the normalized tokens are kept for the backward. A bias
    that is detached costs no sum, see `longtake.ops.bias_gradient`.

    Raises ValueError if there is not.
    """
    if not picks_triton(x_BND):
        return modulated_linear_reference(x_BND, shift_B1D, scale_B1D, weight_OD, bias_O, eps)
    x_BMD = x_BND.flatten(1, -2)
    shift_BD, scale_BD = row_per_sample(shift_B1D, x_BND), row_per_sample(scale_B1D, x_BND)
    x_BMD, y_BMO = _ModulatedLinear.apply(
        x_BMD, shift_BD, scale_BD, weight_OD, bias_O, eps, recompute
    )
    return x_BMD.view_as(x_BND), y_BMO.view(*x_BND.shape[:-1], -1)
