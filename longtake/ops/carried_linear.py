"""A linear layer at the head of a branch that reads the residual stream itself.

The stream goes through the operation: `x, y = carried_linear(x, ...)`. Its gradient then arrives
in the same backward as the branch's, and the product adds to it with one rounding: in place where
the compiler sees that nobody else reads it, else in a copy.

Letters: B batch, N tokens, D hidden size, O outputs, M = B N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.ops.column_sum import column_sum
from longtake.ops.elementwise import picks_triton
from longtake.ops.operation import operation
from longtake.ops.weight_gradient import weight_gradient


def carried_linear_reference(
    x_BND: Tensor, weight_OD: Tensor, bias_O: Tensor
) -> tuple[Tensor, Tensor]:
    """(x, x W^T + b) in plain torch."""
    return x_BND, F.linear(x_BND, weight_OD, bias_O)


# torch.addmm copies its addend before it accumulates: two passes over all tokens. In place there is
# no copy, but the gradient that arrives may be somebody else's: only the compiler knows, and gives
# an operation that changes its argument a copy where it must.
@operation("longtake::add_product", mutates_args=("sum_MD",))
def _add_product(sum_MD: Tensor, a_MO: Tensor, b_OD: Tensor) -> None:
    """Adds a b."""
    sum_MD.addmm_(a_MO, b_OD)


class _CarriedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BND: Tensor, weight_OD: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BND, weight_OD)
        return x_BND.view_as(x_BND), F.linear(x_BND, weight_OD, bias_O)

    @staticmethod
    def backward(ctx, carried_BND: Tensor, dy_BNO: Tensor):
        x_BND, weight_OD = ctx.saved_tensors
        x_MD, dy_MO = x_BND.flatten(0, -2), dy_BNO.flatten(0, -2)
        dx_MD = carried_BND.reshape(-1, carried_BND.shape[-1])
        if torch.compiler.is_compiling():
            _add_product(dx_MD, dy_MO, weight_OD)
        else:
            dx_MD = torch.addmm(dx_MD, dy_MO, weight_OD)
        needs_bias = ctx.needs_input_grad[2]
        dbias_O = column_sum(dy_MO).to(weight_OD.dtype) if needs_bias else None
        return dx_MD.view_as(x_BND), weight_gradient(dy_MO, x_MD), dbias_O


def carried_linear(x_BND: Tensor, weight_OD: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
    """(x, x W^T + b); go on with the x returned. Tokens may have any number of dimensions.

    A bias that is detached costs no sum, see `longtake.ops.bias_gradient`.
    """
    if not picks_triton(x_BND):
        return carried_linear_reference(x_BND, weight_OD, bias_O)
    return _CarriedLinear.apply(x_BND, weight_OD, bias_O)
