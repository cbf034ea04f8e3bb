"""The gradient of a linear layer's weight: a product over all tokens.

Letters: M tokens, O outputs, I inputs.
"""

from __future__ import annotations

from torch import Tensor

# How many times as many outputs as inputs make a result wide.
_WIDE = 4


def weight_gradient(dy_MO: Tensor, x_MI: Tensor) -> Tensor:
    """dy^T x, (O, I); for wide results as the transpose of x^T dy.

    cuBLAS takes another kernel for each orientation: for 4608 x 1152 over 65,536 tokens in bfloat16
    on an H100, 1.32 to 1.45 ms this way round and 0.96 ms the other (once 1.00 and 1.05), while for
    3456 x 1152 and 1152 x 1152 it makes no difference.
    """
    if dy_MO.shape[1] >= _WIDE * x_MI.shape[1]:
        return (x_MI.t() @ dy_MO).t()
    return dy_MO.t() @ x_MI
