"""Self-attention along time at every spatial position, for tokens that stay in (B, T, S) order.

Letters: B batch, T frames, S spatial patches, A heads, E size per head.
"""

from __future__ import annotations

from torch import Tensor

from longtake.ops.attention import attention


def temporal_attention_reference(q_BTSAE: Tensor, k_BTSAE: Tensor, v_BTSAE: Tensor) -> Tensor:
    """Attention over T through copies with S moved into the batch, (B, T, S, A, E)."""
    batch_size = q_BTSAE.shape[0]
    q_NTAE, k_NTAE, v_NTAE = (x.transpose(1, 2).flatten(0, 1) for x in (q_BTSAE, k_BTSAE, v_BTSAE))
    out_NTAE = attention(q_NTAE, k_NTAE, v_NTAE)  # N = B S independent sequences of T
    return out_NTAE.unflatten(0, (batch_size, -1)).transpose(1, 2)


def temporal_attention(q_BTSAE: Tensor, k_BTSAE: Tensor, v_BTSAE: Tensor) -> Tensor:
    """Attention over T, independently for every b, s and head, (B, T, S, A, E) in the dtype of q.

    The inputs may be strided views into one QKV product.
    """
    return temporal_attention_reference(q_BTSAE, k_BTSAE, v_BTSAE)
