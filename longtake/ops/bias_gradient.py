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
    """y itself; the bias, of its last dimensions, is in it, or in one part of the one before."""

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor, part: int | None) -> Tensor:
        ctx.bias_shape, ctx.bias_dtype, ctx.part = bias.shape, bias.dtype, part
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        if not ctx.needs_input_grad[1]:
            return dy, None, None
        num_dims = len(ctx.bias_shape)
        of_part = dy if ctx.part is None else dy.select(-1 - num_dims, ctx.part)
        sums = column_sum(of_part.flatten(-num_dims).flatten(0, -2))
        return dy, sums.view(ctx.bias_shape).to(ctx.bias_dtype), None


def with_bias_gradient(y: Tensor, bias: Tensor) -> Tensor:
    """y itself, in which the bias is already: its gradient, summed in float32, comes from here.

    The bias has the last dimensions of y.
    """
    return _WithBiasGradient.apply(y, bias, None)


def attend_with_bias(
    attend: Callable[[Tensor], Tensor], qkv_N3AE: Tensor, bias_3AE: Tensor
) -> Tensor:
    """attend(qkv), self-attention of a product in which the bias is already; the bias gets its
    gradient from here. Tokens may have any number of dimensions."""
    q_bias_AE, _, v_bias_AE = bias_3AE.unbind(0)
    out_NAE = attend(_WithBiasGradient.apply(qkv_N3AE, q_bias_AE, 0))
    return with_bias_gradient(out_NAE, v_bias_AE)
