"""Sines and cosines of positions at geometric frequencies, the table behind every kind of position.

Letters: N positions, F frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.ops.operation import operation, register_fake

MAX_PERIOD = 10_000.0


def sincos_reference(positions_N: Tensor, num_frequencies: int) -> Tensor:
    """[sin(p w), cos(p w)] for the F frequencies w_i = 10000^(-i/F), in plain torch."""
    index_F = torch.arange(num_frequencies, dtype=torch.float64, device=positions_N.device)
    angle_NF = positions_N.double()[:, None] * MAX_PERIOD ** -(index_F / num_frequencies)
    return torch.cat((angle_NF.sin(), angle_NF.cos()), dim=1).float()


# Opaque to torch.compile, which would otherwise inline the float64 sines of a small table into the
# element-wise kernel over all tokens that reads it, and compute them again for each.
@operation("longtake::sincos")
def _sincos(positions_N: Tensor, num_frequencies: int) -> Tensor:
    return sincos_reference(positions_N, num_frequencies)


@register_fake(_sincos)
def _(positions_N: Tensor, num_frequencies: int) -> Tensor:
    return positions_N.new_empty(len(positions_N), 2 * num_frequencies, dtype=torch.float32)


def sincos(positions_N: Tensor, num_frequencies: int) -> Tensor:
    """Sines, then cosines, of positions at frequencies 10000^(-i/F): (N, 2F).

    Computed in float64, returned in float32. Not differentiable: positions are constants.
    """
    return _sincos(positions_N, num_frequencies)
