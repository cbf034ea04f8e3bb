"""Self-attention along time at every spatial position, for tokens that stay in (B, T, S) order.

The sequences are short and very many: all of one fits on chip, and time is what it takes to read q,
k and v once and to write the output. So the kernel reads them where the QKV product lies, several
sequences to a tile, and saves nothing else: the backward reads q, k, v and the output's gradient,
finds the softmax again, and writes one gradient of the whole product. That is 4 tensors of tokens
moved forward and 7 backward, without a copy into another order.

Letters: B batch, T frames, S spatial patches, A heads, E size per head; 3 is q, k and v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longtake.ops import kernels
from longtake.ops.attention import self_attention_by
from longtake.ops.kernels import triton_problem
from longtake.ops.operation import operation, register_autograd, register_fake
from longtake.ops.temporal_attention_kernel import (
    MAX_FRAMES,
    MAX_HEAD_SIZE,
    launch_backward,
    launch_forward,
)


def temporal_attention_reference(qkv_BTS3AE: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over T with explicit scores in at least float32."""
    dtype = torch.promote_types(qkv_BTS3AE.dtype, torch.float32)
    q_BTSAE, k_BTSAE, v_BTSAE = qkv_BTS3AE.to(dtype).unbind(3)
    # U is T again: the frames that are seen.
    scores_BSATU = torch.einsum("btsae,busae->bsatu", q_BTSAE, k_BTSAE)
    weights_BSATU = (scores_BSATU * q_BTSAE.shape[-1] ** -0.5).softmax(dim=-1)
    out_BTSAE = torch.einsum("bsatu,busae->btsae", weights_BSATU, v_BTSAE)
    return out_BTSAE.to(qkv_BTS3AE.dtype).contiguous()


@operation("longtake::temporal_attention")
def _temporal_attention(
    qkv_BTS3AE: Tensor,  # (B, T, S, 3, A, E), any strides; a dense last dimension saves a copy
) -> Tensor:
    """(B, T, S, A, E), contiguous."""
    return launch_forward(qkv_BTS3AE)


@register_fake(_temporal_attention)
def _(qkv_BTS3AE: Tensor) -> Tensor:
    B, T, S, _, A, E = qkv_BTS3AE.shape
    return qkv_BTS3AE.new_empty(B, T, S, A, E)


@operation("longtake::temporal_attention_backward")
def _temporal_attention_backward(
    dout_BTSAE: Tensor,  # (B, T, S, A, E)
    qkv_BTS3AE: Tensor,  # (B, T, S, 3, A, E)
) -> Tensor:
    """The gradient of qkv, (B, T, S, 3, A, E) and contiguous."""
    return launch_backward(dout_BTSAE, qkv_BTS3AE)


@register_fake(_temporal_attention_backward)
def _(dout_BTSAE: Tensor, qkv_BTS3AE: Tensor) -> Tensor:
    return qkv_BTS3AE.new_empty(qkv_BTS3AE.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout_BTSAE: Tensor) -> Tensor:
    return _temporal_attention_backward(dout_BTSAE, *ctx.saved_tensors)


register_autograd(_temporal_attention, _backward, setup_context=_save_for_backward)


def packed_problem(
    num_frames: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why the packed kernel cannot run on these, or None if it can."""
    name = str(dtype).removeprefix("torch.")
    if dtype not in MAX_FRAMES:
        return f"it computes in bfloat16, float16 or float32, not {name}"
    if num_frames > MAX_FRAMES[dtype]:
        return f"it holds at most {MAX_FRAMES[dtype]} frames of {name}, not {num_frames}"
    if head_size > MAX_HEAD_SIZE:
        return f"it takes heads up to {MAX_HEAD_SIZE}, not {head_size}"
    return triton_problem(device)


def temporal_attention(qkv_BTS3AE: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over T, independently for every b, s and head.

    Takes the QKV product as it lies and returns (B, T, S, A, E), contiguous, in its dtype; the
    softmax is float32. Every backend but the packed kernel first copies the product with S moved
    into the batch.

    Raises:
        ValueError: these are not q, k and v in (B, T, S) order, or the configuration insists on a
            backend that cannot run here.
    """
    if qkv_BTS3AE.ndim != 6 or qkv_BTS3AE.shape[3] != 3:
        raise ValueError(
            f"temporal attention got qkv of shape {tuple(qkv_BTS3AE.shape)}, but expects "
            f"(batch, frames, places, 3, heads, head size): unflatten the last dimension of the "
            f"QKV product into (3, heads, head size)"
        )
    num_frames, head_size = qkv_BTS3AE.shape[1], qkv_BTS3AE.shape[-1]
    dtype, device = qkv_BTS3AE.dtype, qkv_BTS3AE.device
    backend = kernels.attention_backend(
        "temporal_attention", keys=num_frames, head_size=head_size, dtype=dtype, device=device
    )
    if backend == "triton":
        problem = packed_problem(num_frames, head_size, dtype, device)
        if problem:
            raise ValueError(
                f'temporal attention by "triton" cannot run here: {problem}; use "auto" or "sdpa"'
            )
        return _temporal_attention(qkv_BTS3AE)
    if backend == "reference":
        return temporal_attention_reference(qkv_BTS3AE)
    qkv_NT3AE = qkv_BTS3AE.transpose(1, 2).flatten(0, 1)  # N = B S independent sequences
    out_NTAE = self_attention_by(backend, qkv_NT3AE)
    return out_NTAE.unflatten(0, (qkv_BTS3AE.shape[0], -1)).transpose(1, 2).contiguous()
