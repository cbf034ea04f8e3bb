"""A linear layer at the head of a branch that reads the residual stream itself.

The stream goes through the operation: `x, y = carried_linear(x, ...)`. Its gradient then arrives
in the same backward as the branch's, and the product adds to it with one rounding. (PyTorch copies
an addend before it accumulates, so this saves no pass yet; adding in place would, but the gradient
that arrives may be somebody else's.)

Letters: B batch, N tokens, D hidden size, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.ops.column_sum import column_sum
from longtake.ops.elementwise import picks_triton


def carried_linear_reference(
    x_BND: Tensor, weight_OD: Tensor, bias_O: Tensor
) -> tuple[Tensor, Tensor]:
    """(x, x W^T + b) in plain torch."""
    return x_BND, F.linear(x_BND, weight_OD, bias_O)


class _CarriedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BND: Tensor, weight_OD: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BND, weight_OD)
        return x_BND.view_as(x_BND), F.linear(x_BND, weight_OD, bias_O)

    @staticmethod
    def backward(ctx, carried_BND: Tensor, dy_BNO: Tensor):
        x_BND, weight_OD = ctx.saved_tensors
        x_MD, dy_MO = x_BND.flatten(0, -2), dy_BNO.flatten(0, -2)
        dx_MD = torch.addmm(carried_BND.flatten(0, -2), dy_MO, weight_OD)
        dbias_O = column_sum(dy_MO).to(weight_OD.dtype)
        return dx_MD.view_as(x_BND), dy_MO.t() @ x_MD, dbias_O


def carried_linear(x_BND: Tensor, weight_OD: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
    """(x, x W^T + b); go on with the x returned. Tokens may have any number of dimensions."""
    if not picks_triton(x_BND):
        return carried_linear_reference(x_BND, weight_OD, bias_O)
    return _CarriedLinear.apply(x_BND, weight_OD, bias_O)
