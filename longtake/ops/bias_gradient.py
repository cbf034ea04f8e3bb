"""Gradients of biases that are taken elsewhere than in the linear layers that added them.

The gradient of a bias is the sum over all tokens of the gradient of what it was added to: a pass
over that. Of q, k and v two thirds of the pass can be spared or moved to a smaller tensor:

    k: zero. Its bias adds the same to all scores of a row, which a softmax does not see.
    v: the sum of the output's gradient. The weights of a row sum to one, so the bias arrives in
       each output as it is.

A layer is given a detached bias then, and attention the bias itself.

Letters: A heads, E size per head; 3 is q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.ops.column_sum import column_sum


class _WithBiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        ctx.bias_shape, ctx.bias_dtype = bias.shape, bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        if not ctx.needs_input_grad[1]:
            return dy, None
        dy_NF = dy.flatten(-len(ctx.bias_shape)).flatten(0, -2)
        return dy, column_sum(dy_NF).view(ctx.bias_shape).to(ctx.bias_dtype)


def with_bias_gradient(y: Tensor, bias: Tensor) -> Tensor:
    """y itself, in which the bias is already: its gradient, summed in float32, comes from here.

    The bias has the last dimensions of y.
    """
    return _WithBiasGradient.apply(y, bias)


class _WithQueryBiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_N3AE: Tensor, q_bias_AE: Tensor) -> Tensor:
        ctx.bias_shape, ctx.bias_dtype = q_bias_AE.shape, q_bias_AE.dtype
        return qkv_N3AE.view_as(qkv_N3AE)

    @staticmethod
    def backward(ctx, dqkv_N3AE: Tensor):
        if not ctx.needs_input_grad[1]:
            return dqkv_N3AE, None
        dq_NF = dqkv_N3AE.flatten(0, -4).flatten(-2)[:, 0]
        return dqkv_N3AE, column_sum(dq_NF).view(ctx.bias_shape).to(ctx.bias_dtype)


def attend_with_bias(
    attend: Callable[[Tensor], Tensor], qkv_N3AE: Tensor, bias_3AE: Tensor
) -> Tensor:
    """attend(qkv), self-attention of a product in which the bias is already; the bias gets its
    gradient from here. Tokens may have any number of dimensions."""
    q_bias_AE, _, v_bias_AE = bias_3AE.unbind(0)
    out_NAE = attend(_WithQueryBiasGradient.apply(qkv_N3AE, q_bias_AE))
    return with_bias_gradient(out_NAE, v_bias_AE)
