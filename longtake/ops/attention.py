"""Softmax attention of tokens among themselves, by whichever implementation is picked.

Letters: B batch, N tokens, A heads, E size per head; 3 is q, k and v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.ops import kernels
from longtake.ops.cudnn_attention import cudnn_attention, cudnn_problem
from longtake.ops.fa4_attention import fa4_attention, fa4_problem
from longtake.ops.flash_attention import flash_attention, flash_problem
from longtake.ops.plain_attention import attention_reference, attention_sdpa

_BACKENDS = {"sdpa": attention_sdpa, "reference": attention_reference}


def self_attention(qkv_BN3AE: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v of tokens among themselves, (B, N, A, E) in the dtype of qkv.

    qkv_BN3AE is the packed product of q, k and v: fused backends read it in place and write its
    gradient as one tensor.

    Raises:
        ValueError: the configuration insists on a backend that cannot run here.
    """
    backend = kernels.attention_backend(
        "self_attention",
        keys=qkv_BN3AE.shape[1],
        head_size=qkv_BN3AE.shape[-1],
        dtype=qkv_BN3AE.dtype,
        device=qkv_BN3AE.device,
    )
    return self_attention_by(backend, qkv_BN3AE)


def self_attention_by(backend: kernels.AttentionBackend, qkv_BN3AE: Tensor) -> Tensor:
    """`self_attention` by one backend."""
    if backend == "triton":
        return flash_attention(qkv_BN3AE)
    if backend == "fa4":
        return fa4_attention(qkv_BN3AE)
    if backend == "cudnn":
        return cudnn_attention(qkv_BN3AE)
    return _BACKENDS[backend](*qkv_BN3AE.unbind(2))


def backend_problem(
    backend: kernels.AttentionBackend, device: torch.device, dtype: torch.dtype, head_size: int
) -> str | None:
    """Why a backend cannot run on these, or None if it can."""
    if backend == "triton":
        return flash_problem(head_size, dtype, device)
    if backend == "fa4":
        return fa4_problem(device, dtype, head_size)
    if backend == "cudnn":
        return cudnn_problem(device, dtype, head_size)
    return None
