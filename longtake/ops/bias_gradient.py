"""Gradients of biases that are taken elsewhere than in the linear layers that added them.

The gradient of a bias is the sum over all tokens of the gradient of what it was added to: a pass
over that. Of the bias of q, k and v two thirds of the pass are spared:

    q: summed, over a third of the product's gradient.
    k: zero. It adds the same to all scores of a row, which a softmax does not see.
    v: from the gradient of the bias of the layer that reads what was attended to. The weights of a
       row sum to one, so v's bias arrives in each output as it is, and what it does, W b_v, is done
       by that other bias as well: its gradient times W (`gated_linear`).

A layer is given a detached bias then, and the bias itself goes to whoever gives the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.ops.column_sum import column_sum


class _WithBiasGradient(torch.autograd.Function):
    """y itself, in which the bias is already."""

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        ctx.bias_shape, ctx.bias_dtype = bias.shape, bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        if not ctx.needs_input_grad[1]:
            return dy, None
        num_dims = len(ctx.bias_shape)
        of_parts = dy.narrow(-num_dims, 0, ctx.bias_shape[0])
        sums = column_sum(of_parts.flatten(-num_dims).flatten(0, -2))
        return dy, sums.view(ctx.bias_shape).to(ctx.bias_dtype)


def with_bias_gradient(y: Tensor, bias: Tensor) -> Tensor:
    """y itself, in which the bias is already: its gradient, summed in float32, comes from here.

    The bias has the last dimensions of y, or of the first parts along the first of these: for y of
    (B, N, 3, A, E) a bias of (2, A, E) is in q and k.
    """
    return _WithBiasGradient.apply(y, bias)
