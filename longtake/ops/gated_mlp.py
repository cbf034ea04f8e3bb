"""A block's whole MLP branch: norm, modulation, two linear layers around a GELU, gate, residual.

It keeps its input, the first layer's output before the GELU and, unless the gate goes into the
weights (`gated_product`), the second layer's output. What is between (normalized tokens,
activations: five widths of the stream) is computed again in backward passes that read the same
memory anyway, for the price of writing it. Or it is kept, too; then the second layer's backward
product ends with the GELU's gradient.

Letters: B batch, N tokens, D hidden size, F inner size, M = B N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.ops.column_sum import column_sum
from longtake.ops.elementwise import picks_triton
from longtake.ops.gated_product import GatedProductBackward, gated_product_forward
from longtake.ops.gated_residual import gated_residual_reference
from longtake.ops.gelu import gelu_backward, gelu_forward, gelu_reference
from longtake.ops.norm_modulate import (
    norm_modulate_backward,
    norm_modulate_forward,
    norm_modulate_reference,
)
from longtake.ops.products import gelu_input_gradient
from longtake.ops.row_per_sample import row_per_sample
from longtake.ops.weight_gradient import weight_gradient


def gated_mlp_reference(
    x_BND: Tensor,
    shift_B1D: Tensor,
    scale_B1D: Tensor,
    gate_B1D: Tensor,
    weight1_FD: Tensor,
    bias1_F: Tensor,
    weight2_DF: Tensor,
    bias2_D: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """x + gate * (gelu(modulated W1^T + b1) W2^T + b2) in plain torch."""
    h_BND = norm_modulate_reference(x_BND, shift_B1D, scale_B1D, eps)
    act_BNF = gelu_reference(F.linear(h_BND, weight1_FD, bias1_F))
    return gated_residual_reference(x_BND, gate_B1D, F.linear(act_BNF, weight2_DF, bias2_D))


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_BND: Tensor,
        shift_BD: Tensor,
        scale_BD: Tensor,
        gate_BD: Tensor,
        weight1_FD: Tensor,
        bias1_F: Tensor,
        weight2_DF: Tensor,
        bias2_D: Tensor,
        eps: float,
        recompute: bool,
    ) -> Tensor:
        h_BND, mean_BN, rstd_BN = norm_modulate_forward(x_BND, shift_BD, scale_BD, eps)
        pre_BNF = F.linear(h_BND, weight1_FD, bias1_F)
        act_BNF = gelu_forward(pre_BNF)
        out_BND, y_BND = gated_product_forward(x_BND, gate_BD, act_BNF, weight2_DF, bias2_D)
        ctx.save_for_backward(
            x_BND,
            mean_BN,
            rstd_BN,
            shift_BD,
            scale_BD,
            weight1_FD,
            pre_BNF,
            None if recompute else h_BND,
            None if recompute else act_BNF,
            gate_BD,
            weight2_DF,
            bias2_D,
            y_BND,
        )
        return out_BND

    @staticmethod
    def backward(ctx, dout_BND: Tensor):
        x_BND, mean_BN, rstd_BN, shift_BD, scale_BD, weight1_FD, *rest = ctx.saved_tensors
        pre_BNF, h_BND, act_BNF, *second = rest
        recompute = act_BNF is None
        backward = GatedProductBackward.of(dout_BND, *second)
        if recompute:
            dpre_MF, act_MF, dbias1_F = gelu_backward(
                (backward.dy @ backward.weight).view(-1, pre_BNF.shape[-1]),
                pre_BNF.flatten(0, 1),
                True,
            )
            act_BNF = act_MF.view_as(pre_BNF)
        else:
            dpre = gelu_input_gradient(backward.dy, backward.weight, backward.rows(pre_BNF))
            dpre_MF = dpre.view(-1, pre_BNF.shape[-1])
            dbias1_F = column_sum(dpre_MF)
        dgate_BD, dweight2_DF, dbias2_D = backward.layer_gradients(act_BNF)
        dh_BND = (dpre_MF @ weight1_FD).view_as(x_BND)
        dx_BND, dshift_BD, dscale_BD, again_BND = norm_modulate_backward(
            dh_BND, x_BND, mean_BN, rstd_BN, shift_BD, scale_BD, dout_BND, recompute
        )
        h_BND = again_BND if recompute else h_BND
        return (
            dx_BND,
            dshift_BD.to(shift_BD.dtype),
            dscale_BD.to(scale_BD.dtype),
            dgate_BD,
            weight_gradient(dpre_MF, h_BND.flatten(0, 1)),
            dbias1_F.to(weight1_FD.dtype),
            dweight2_DF,
            dbias2_D.to(weight1_FD.dtype),
            None,
            None,
        )


def gated_mlp(
    x_BND: Tensor,
    shift_B1D: Tensor,
    scale_B1D: Tensor,
    gate_B1D: Tensor,
    weight1_FD: Tensor,
    bias1_F: Tensor,
    weight2_DF: Tensor,
    bias2_D: Tensor,
    eps: float = 1e-6,
    *,
    recompute: bool = True,
) -> Tensor:
    """x + gate * mlp(LayerNorm(x) * (1 + scale) + shift), with the shape and dtype of x.

    The GELU is the tanh-approximated one. Tokens may have any number of dimensions; there is one
    row of shift, scale and gate per sample. Without `recompute` normalized tokens and activations
    are kept for the backward.

    Raises ValueError if there is not.
    """
    rows = (shift_B1D, scale_B1D, gate_B1D)
    weights = (weight1_FD, bias1_F, weight2_DF, bias2_D)
    if not picks_triton(x_BND):
        return gated_mlp_reference(x_BND, *rows, *weights, eps)
    rows = (row_per_sample(row, x_BND) for row in rows)
    return _GatedMlp.apply(x_BND.flatten(1, -2), *rows, *weights, eps, recompute).view_as(x_BND)
