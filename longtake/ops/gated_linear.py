"""The end of a branch: its last linear layer, whose output joins the residual stream.

Letters: B batch, N tokens, D hidden size, I inputs of the layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.ops.bias_gradient import with_bias_gradient
from longtake.ops.column_sum import column_sum
from longtake.ops.elementwise import picks_triton
from longtake.ops.gated_product import GatedProductBackward, gated_product_forward
from longtake.ops.gated_residual import gated_residual_reference
from longtake.ops.products import residual_product
from longtake.ops.row_per_sample import row_per_sample
from longtake.ops.weight_gradient import weight_gradient


def gated_linear_reference(
    x_BND: Tensor,
    gate_B1D: Tensor | None,
    h_BNI: Tensor,
    weight_DI: Tensor,
    bias_D: Tensor,
    input_bias_I: Tensor | None = None,
) -> Tensor:
    """x + gate * (h W^T + b) in plain torch; no gate is a gate of one."""
    if input_bias_I is not None:
        h_BNI = with_bias_gradient(h_BNI, input_bias_I)
    y_BND = F.linear(h_BNI, weight_DI, bias_D)
    return x_BND + y_BND if gate_B1D is None else gated_residual_reference(x_BND, gate_B1D, y_BND)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_BND: Tensor,
        gate_BD: Tensor,
        h_BNI: Tensor,
        weight_DI: Tensor,
        bias_D: Tensor,
        input_bias_I: Tensor | None,
    ) -> Tensor:
        out_BND, y_BND = gated_product_forward(x_BND, gate_BD, h_BNI, weight_DI, bias_D)
        ctx.save_for_backward(gate_BD, h_BNI, weight_DI, bias_D, y_BND)
        return out_BND

    @staticmethod
    def backward(ctx, dout_BND: Tensor):
        gate_BD, h_BNI, weight_DI, *rest = ctx.saved_tensors
        backward = GatedProductBackward.of(dout_BND, gate_BD, weight_DI, *rest)
        dh_BNI = (backward.dy @ backward.weight).view_as(h_BNI)
        dgate_BD, dweight_DI, dbias_D = backward.layer_gradients(h_BNI)
        dinput_bias_I = (
            _input_bias_gradient(dbias_D, weight_DI) if ctx.needs_input_grad[5] else None
        )
        dbias_D = dbias_D.to(weight_DI.dtype)
        return dout_BND, dgate_BD, dh_BNI, dweight_DI, dbias_D, dinput_bias_I


class _AddedLinear(torch.autograd.Function):
    """Without a gate, the gradient of the stream is that of the layer, too."""

    @staticmethod
    def forward(ctx, x_BND: Tensor, h_BNI: Tensor, weight_DI: Tensor, bias_D: Tensor) -> Tensor:
        ctx.save_for_backward(h_BNI, weight_DI)
        rows_1MD, rows_1MI = x_BND.flatten(0, 1)[None], h_BNI.flatten(0, 1)[None]
        out_1MD = residual_product(rows_1MD, rows_1MI, weight_DI[None], bias_D[None])
        return out_1MD.view_as(x_BND)

    @staticmethod
    def backward(ctx, dout_BND: Tensor):
        h_BNI, weight_DI = ctx.saved_tensors
        dout_MD = dout_BND.flatten(0, -2)
        dh_BNI = (dout_MD @ weight_DI).view_as(h_BNI)
        dweight_DI = weight_gradient(dout_MD, h_BNI.flatten(0, -2))
        return dout_BND, dh_BNI, dweight_DI, column_sum(dout_MD).to(weight_DI.dtype)


def _input_bias_gradient(dbias_D: Tensor, weight_DI: Tensor) -> Tensor:
    """The sum over all tokens of dy W, from that of dy."""
    return (dbias_D[:, None] * weight_DI).sum(0).to(weight_DI.dtype)


def gated_linear(
    x_BND: Tensor,
    gate_B1D: Tensor | None,
    h_BNI: Tensor,
    weight_DI: Tensor,
    bias_D: Tensor,
    input_bias_I: Tensor | None = None,
) -> Tensor:
    """x + gate * (h W^T + b), or x + h W^T + b without a gate, with the shape and dtype of x.

    Tokens may have any number of dimensions. input_bias is one that is in h already, the same in
    all tokens, behind a gate only: it gets its gradient here, without a pass over them
    (`longtake.ops.bias_gradient`).

    Raises ValueError if the gate is not one row per sample.
    """
    assert gate_B1D is not None or input_bias_I is None, "an input bias needs a gate"
    if not picks_triton(x_BND):
        return gated_linear_reference(x_BND, gate_B1D, h_BNI, weight_DI, bias_D, input_bias_I)
    x_BMD, h_BMI = x_BND.flatten(1, -2), h_BNI.flatten(1, -2)
    if gate_B1D is None:
        out_BMD = _AddedLinear.apply(x_BMD, h_BMI, weight_DI, bias_D)
    else:
        gate_BD = row_per_sample(gate_B1D, x_BND)
        out_BMD = _GatedLinear.apply(x_BMD, gate_BD, h_BMI, weight_DI, bias_D, input_bias_I)
    return out_BMD.view_as(x_BND)
