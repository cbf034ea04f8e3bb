"""A linear layer whose output a gate multiplies before it joins the stream, forward and backward.

In one of two ways. *Beside the product*: the layer's output is kept, and passes over all tokens
multiply by the gate. *In the weights*: diag(gate) W is a weight for each sample, the product itself
adds the stream, and nothing is kept; the gate's gradient comes out of that of the sample's weight,
dgate = rowsum(W * dout^T h) + b * sum(dout). That saves four passes over tokens and costs as many
over a weight per sample, so it is for samples with many tokens, and for layers as narrow as the
output layer of attention. (With the MLP's, four times as wide, a step of 16x512 was slower.)

Letters: B batch, N tokens, D hidden size, I inputs of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.ops.gated_residual import gated_residual_backward, gated_residual_forward
from longtake.ops.products import residual_product
from longtake.ops.sample_weights import merge_sample_gradients
from longtake.ops.weight_gradient import weight_gradient

# A sample of so many tokens per input of the layer has its gate in the weights. At one, the traffic
# saved and caused is equal; but small products leave multiprocessors idle at their ends.
FOLDING_TOKENS_PER_INPUT = 2


def folds_gate(x_BND: Tensor, gate_BD: Tensor, h_BNI: Tensor, weight_DI: Tensor) -> bool:
    """Whether the gate goes into the weights: products want operands of one dtype, too."""
    num_tokens, num_inputs = h_BNI.shape[1:]
    return (
        num_inputs <= x_BND.shape[2]
        and num_tokens >= FOLDING_TOKENS_PER_INPUT * num_inputs
        and x_BND.dtype == gate_BD.dtype == h_BNI.dtype == weight_DI.dtype
    )


def gated_product_forward(
    x_BND: Tensor, gate_BD: Tensor, h_BNI: Tensor, weight_DI: Tensor, bias_D: Tensor
) -> tuple[Tensor, Tensor | None]:
    """x + gate * (h W^T + b), and h W^T + b if the backward wants it."""
    if folds_gate(x_BND, gate_BD, h_BNI, weight_DI):
        weight_BDI = gate_BD[:, :, None] * weight_DI
        return residual_product(x_BND, h_BNI, weight_BDI, gate_BD * bias_D), None
    y_BND = F.linear(h_BNI, weight_DI, bias_D)
    return gated_residual_forward(x_BND, gate_BD, y_BND), y_BND


@dataclass(frozen=True)
class GatedProductBackward:
    """What the gradients of h, of the gate and of the layer are computed from.

    The gradient of h is `dy @ weight`. Either both are those of the layer, over the rows of all
    samples, (B N, D) and (D, I); or the gate is in the weights, and dy is the stream's gradient,
    (B, N, D) and (B, D, I).
    """

    dy: Tensor
    weight: Tensor
    gate_BD: Tensor
    weight_DI: Tensor
    bias_D: Tensor
    dgate_BD: Tensor | None
    dbias_D: Tensor | None

    @staticmethod
    def of(
        dout_BND: Tensor,
        gate_BD: Tensor,
        weight_DI: Tensor,
        bias_D: Tensor,
        y_BND: Tensor | None,
    ) -> GatedProductBackward:
        """From the gradient of the stream and what `gated_product_forward` gave back for it."""
        layer = gate_BD, weight_DI, bias_D
        if y_BND is None:
            weight_BDI = gate_BD[:, :, None] * weight_DI
            return GatedProductBackward(dout_BND, weight_BDI, *layer, None, None)
        dy_BND, dgate_BD, dbias_D = gated_residual_backward(dout_BND, gate_BD, y_BND)
        return GatedProductBackward(dy_BND.flatten(0, 1), weight_DI, *layer, dgate_BD, dbias_D)

    def rows(self, h_BNI: Tensor) -> Tensor:
        """h, or anything else beside dy, in the shape that dy has."""
        return h_BNI.flatten(0, 1) if self.dy.ndim == 2 else h_BNI

    def layer_gradients(self, h_BNI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of gate (B, D) and weight (D, I) in their dtypes, and of bias (D,) in float32."""
        dweight = weight_gradient(self.dy, self.rows(h_BNI))
        layer = self.gate_BD, self.weight_DI, self.bias_D
        if self.dgate_BD is None or self.dbias_D is None:
            return merge_sample_gradients(dweight, self.dy.sum(1, dtype=torch.float32), *layer)
        dgate_BD, dweight = self.dgate_BD.to(self.gate_BD.dtype), dweight.to(self.weight_DI.dtype)
        return dgate_BD, dweight, self.dbias_D
