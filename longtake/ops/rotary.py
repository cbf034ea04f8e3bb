"""Rotary positions: queries and keys are turned by angles that grow with their place in time.

Letters: B batch, T frames, S spatial patches, A heads, E size per head, F = E/2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_reference(x_BTSAE: Tensor, sin_TF: Tensor, cos_TF: Tensor) -> Tensor:
    """Each pair (x_2i, x_2i+1) turned by angle i of its frame, in plain torch."""
    sin_T11F, cos_T11F = sin_TF[:, None, None], cos_TF[:, None, None]
    dtype = torch.promote_types(x_BTSAE.dtype, torch.float32)
    even, odd = x_BTSAE.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = (even * cos_T11F - odd * sin_T11F, odd * cos_T11F + even * sin_T11F)
    return torch.stack(turned, dim=-1).flatten(-2).to(x_BTSAE.dtype)


def rotary(x_BTSAE: Tensor, sin_TF: Tensor, cos_TF: Tensor) -> Tensor:
    """Neighbouring pairs of the last dimension turned by the angles of their frame.

    sin and cos are float32 and so is the arithmetic: bfloat16 angles would blur frames far apart.

    Source: Su et al., "RoFormer", arXiv:2104.09864.
    """
    return rotary_reference(x_BTSAE, sin_TF, cos_TF)
