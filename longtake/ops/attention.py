"""Softmax attention: of tokens among themselves, by whichever implementation is picked, and the two
in PyTorch that other kinds of attention build on.

Letters: B batch, N queries, L keys, A heads, E size per head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.ops import kernels
from longtake.ops.cudnn_attention import cudnn_attention, cudnn_problem
from longtake.ops.fa4_attention import fa4_attention, fa4_problem


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
        # It imports this file for what plain torch computes.
        from longtake.ops.flash_attention import flash_attention

        return flash_attention(qkv_BN3AE)
    if backend == "fa4":
        return fa4_attention(qkv_BN3AE)
    if backend == "cudnn":
        return cudnn_attention(qkv_BN3AE)
    return _BACKENDS[backend](*qkv_BN3AE.unbind(2))


def triton_problem(device: torch.device) -> str | None:
    """Why our kernels cannot run on this device, or None if they can."""
    if not kernels.has_triton:
        return "Triton is not installed"
    if not kernels.runs_triton(device) and not kernels.is_interpreted():
        return f"it needs a CUDA device, not {device.type}"
    return None


def backend_problem(
    backend: kernels.AttentionBackend, device: torch.device, dtype: torch.dtype, head_size: int
) -> str | None:
    """Why a backend cannot run on these, or None if it can."""
    if backend == "triton":
        from longtake.ops.flash_attention import flash_problem

        return flash_problem(head_size, dtype, device)
    if backend == "fa4":
        return fa4_problem(device, dtype, head_size)
    if backend == "cudnn":
        return cudnn_problem(device, dtype, head_size)
    return None
