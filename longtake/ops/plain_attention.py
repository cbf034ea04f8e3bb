"""Softmax attention of queries over keys in PyTorch: spelled out, and by its fused kernels.

Letters: B batch, N queries, L keys, A heads, E size per head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_reference(
    q_BNAE: Tensor, k_BLAE: Tensor, v_BLAE: Tensor, key_mask_BL: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v with explicit scores in at least float32, (B, N, A, E)."""
    dtype = torch.promote_types(q_BNAE.dtype, torch.float32)
    scores_BANL = torch.einsum("bnae,blae->banl", q_BNAE.to(dtype), k_BLAE.to(dtype))
    scores_BANL = scores_BANL * q_BNAE.shape[-1] ** -0.5
    if key_mask_BL is not None:
        scores_BANL = scores_BANL.masked_fill(~key_mask_BL[:, None, None, :], float("-inf"))
    weights_BANL = scores_BANL.softmax(dim=-1)
    return torch.einsum("banl,blae->bnae", weights_BANL, v_BLAE.to(dtype)).to(q_BNAE.dtype)


def attention_sdpa(
    q_BNAE: Tensor, k_BLAE: Tensor, v_BLAE: Tensor, key_mask_BL: Tensor | None = None
) -> Tensor:
    """The same through PyTorch's fused kernels, which read strided views: nothing is copied."""
    out_BANE = F.scaled_dot_product_attention(
        q_BNAE.transpose(1, 2),
        k_BLAE.transpose(1, 2),
        v_BLAE.transpose(1, 2),
        attn_mask=None if key_mask_BL is None else key_mask_BL[:, None, None, :],
    )
    return out_BANE.transpose(1, 2)
