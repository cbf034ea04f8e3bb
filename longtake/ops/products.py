"""Matrix products that end with what otherwise were a pass over all tokens.

Letters: B batch, N tokens, D outputs, I inputs, M rows, F inner size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.ops.cublaslt import product, runs_cublaslt
from longtake.ops.gated_residual import gated_residual_forward
from longtake.ops.gelu import gelu_backward
from longtake.ops.operation import operation, register_fake


@operation("longtake::residual_product")
def _residual_product(x_BND: Tensor, h_BNI: Tensor, weight_BDI: Tensor, bias_BD: Tensor) -> Tensor:
    tensors = tuple(t.contiguous() for t in (x_BND, h_BNI, weight_BDI, bias_BD))
    x_BND, h_BNI, weight_BDI, bias_BD = tensors
    if runs_cublaslt(*tensors):
        out_BND = product(h_BNI, weight_BDI, is_transposed=True, addend_BMO=x_BND, bias_BO=bias_BD)
        if out_BND is not None:
            return out_BND
    if len(weight_BDI) == 1:
        y_BND = F.linear(h_BNI, weight_BDI[0], bias_BD[0])
    else:
        y_BND = torch.baddbmm(bias_BD[:, None], h_BNI, weight_BDI.mT)
    return gated_residual_forward(x_BND, None, y_BND)


@register_fake(_residual_product)
def _(x_BND: Tensor, h_BNI: Tensor, weight_BDI: Tensor, bias_BD: Tensor) -> Tensor:
    return x_BND.new_empty(x_BND.shape)


def residual_product(x_BND: Tensor, h_BNI: Tensor, weight_BDI: Tensor, bias_BD: Tensor) -> Tensor:
    """x + h W^T + b, each sample with weights and bias of its own. Not differentiable.

    The product reads x and writes the sum: `torch.baddbmm` would copy x first.
    """
    return _residual_product(x_BND, h_BNI, weight_BDI, bias_BD)


@operation("longtake::gelu_input_gradient")
def _gelu_input_gradient(dy_BND: Tensor, weight_BDF: Tensor, pre_BNF: Tensor) -> Tensor:
    tensors = tuple(t.contiguous() for t in (dy_BND, weight_BDF, pre_BNF))
    dy_BND, weight_BDF, pre_BNF = tensors
    if runs_cublaslt(*tensors):
        dpre_BNF = product(dy_BND, weight_BDF, is_transposed=False, gelu_aux_BMO=pre_BNF)
        if dpre_BNF is not None:
            return dpre_BNF
    dact_BNF = torch.bmm(dy_BND, weight_BDF)
    return gelu_backward(dact_BNF.flatten(0, 1), pre_BNF.flatten(0, 1), False)[0].view_as(pre_BNF)


@register_fake(_gelu_input_gradient)
def _(dy_BND: Tensor, weight_BDF: Tensor, pre_BNF: Tensor) -> Tensor:
    return pre_BNF.new_empty(pre_BNF.shape)


def gelu_input_gradient(dy_BND: Tensor, weight_BDF: Tensor, pre_BNF: Tensor) -> Tensor:
    """(dy W) * gelu'(pre), the gradient of what was given to a tanh-approximated GELU and the layer
    after it. Not differentiable. With one weight for all, there may be no B."""
    if dy_BND.ndim == 2:
        return _gelu_input_gradient(dy_BND[None], weight_BDF[None], pre_BNF[None])[0]
    return _gelu_input_gradient(dy_BND, weight_BDF, pre_BNF)
