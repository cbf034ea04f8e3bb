"""Attention of a video's tokens to its caption: very many queries, few keys.

Letters: B batch, N queries, L text tokens, A heads, E size per head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longtake.ops import kernels
from longtake.ops.kernels import triton_problem
from longtake.ops.operation import operation, register_autograd, register_fake
from longtake.ops.plain_attention import attention_sdpa
from longtake.ops.text_attention_kernel import MAX_HEAD_SIZE, launch_backward, launch_forward


def text_attention_reference(
    q_BNAE: Tensor, kv_BL2AE: Tensor, key_mask_BL: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v with explicit scores in at least float32, (B, N, A, E)."""
    dtype = torch.promote_types(q_BNAE.dtype, torch.float32)
    k_BLAE, v_BLAE = kv_BL2AE.to(dtype).unbind(2)
    scores_BANL = torch.einsum("bnae,blae->banl", q_BNAE.to(dtype), k_BLAE)
    scores_BANL = scores_BANL * q_BNAE.shape[-1] ** -0.5
    if key_mask_BL is not None:
        key_mask_BL, v_BLAE = _fill_empty(key_mask_BL, v_BLAE)
        scores_BANL = scores_BANL.masked_fill(~key_mask_BL[:, None, None, :], float("-inf"))
    out_BNAE = torch.einsum("banl,blae->bnae", scores_BANL.softmax(dim=-1), v_BLAE)
    return out_BNAE.to(q_BNAE.dtype).contiguous()


def _text_attention_sdpa(q_BNAE: Tensor, kv_BL2AE: Tensor, key_mask_BL: Tensor | None) -> Tensor:
    k_BLAE, v_BLAE = kv_BL2AE.unbind(2)
    if key_mask_BL is not None:
        key_mask_BL, v_BLAE = _fill_empty(key_mask_BL, v_BLAE)
    return attention_sdpa(q_BNAE, k_BLAE, v_BLAE, key_mask_BL).contiguous()


def _fill_empty(key_mask_BL: Tensor, v_BLAE: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over nothing is 0/0: an empty caption sees all of its keys, with values of zero."""
    is_empty_B = ~key_mask_BL.any(dim=1)
    v_BLAE = v_BLAE.masked_fill(is_empty_B[:, None, None, None], 0)
    return key_mask_BL | is_empty_B[:, None], v_BLAE


@operation("longtake::text_attention")
def _text_attention(
    q_BNAE: Tensor, kv_BL2AE: Tensor, key_mask_BL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse): lse is float32 (B, A, N), what the backward needs to find the weights again."""
    return launch_forward(q_BNAE, kv_BL2AE, key_mask_BL)


@register_fake(_text_attention)
def _(q_BNAE: Tensor, kv_BL2AE: Tensor, key_mask_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    B, N, A, E = q_BNAE.shape
    return q_BNAE.new_empty(B, N, A, E), q_BNAE.new_empty(B, A, N, dtype=torch.float32)


@operation("longtake::text_attention_backward")
def _text_attention_backward(
    dout_BNAE: Tensor,
    q_BNAE: Tensor,
    kv_BL2AE: Tensor,
    key_mask_BL: Tensor | None,
    lse_BAN: Tensor,
) -> tuple[Tensor, Tensor]:
    """(dq, dkv). The output is not needed: a tile holds whole rows of the weights."""
    return launch_backward(dout_BNAE, q_BNAE, kv_BL2AE, key_mask_BL, lse_BAN)


@register_fake(_text_attention_backward)
def _(
    dout_BNAE: Tensor,
    q_BNAE: Tensor,
    kv_BL2AE: Tensor,
    key_mask_BL: Tensor | None,
    lse_BAN: Tensor,
) -> tuple[Tensor, Tensor]:
    return q_BNAE.new_empty(q_BNAE.shape), kv_BL2AE.new_empty(kv_BL2AE.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout_BNAE: Tensor | None, dlse_BAN: Tensor | None) -> tuple[Any, ...]:
    assert dlse_BAN is None, "lse is for the backward alone, and has no gradient"
    if dout_BNAE is None:
        return None, None, None
    return *_text_attention_backward(dout_BNAE, *ctx.saved_tensors), None


register_autograd(_text_attention, _gradients, setup_context=_save)


def text_attention(q_BNAE: Tensor, kv_BL2AE: Tensor, key_mask_BL: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, contiguous (B, N, A, E) in the dtype of q.

    kv holds keys at [:, :, 0] and values at [:, :, 1], as one projection of the text gives them.
    key_mask_BL is True where a key may be attended. A batch element without any such key gets
    zeros, and zero gradients: an empty caption says nothing, and never NaN.

    Raises:
        ValueError: the mask is not boolean, or the Triton kernel was asked for by name and cannot
            run here.
    """
    L, E = kv_BL2AE.shape[1], q_BNAE.shape[-1]
    assert kv_BL2AE.shape == (q_BNAE.shape[0], L, 2, *q_BNAE.shape[2:]), (
        f"q of {tuple(q_BNAE.shape)} = (B, N, A, E) needs kv of (B, L, 2, A, E), "
        f"not {tuple(kv_BL2AE.shape)}"
    )
    if key_mask_BL is not None and key_mask_BL.dtype != torch.bool:
        raise ValueError(
            f"the key mask is {key_mask_BL.dtype}, but must be torch.bool, True on keys that "
            f"may be attended: pass mask.bool()"
        )
    backend = kernels.attention_backend(
        "cross_attention", keys=L, head_size=E, dtype=q_BNAE.dtype, device=q_BNAE.device
    )
    if backend == "triton":
        problem = _triton_problem(L, E, q_BNAE.dtype, q_BNAE.device)
        if problem:
            raise ValueError(
                f'cross attention by "triton" cannot run here: {problem}; use "auto" or "sdpa"'
            )
        return _text_attention(q_BNAE, kv_BL2AE, key_mask_BL)[0]
    if backend == "reference":
        return text_attention_reference(q_BNAE, kv_BL2AE, key_mask_BL)
    return _text_attention_sdpa(q_BNAE, kv_BL2AE, key_mask_BL)


@torch.compiler.assume_constant_result
def _triton_problem(
    num_keys: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why the kernel cannot run on these, or None if it can."""
    if num_keys > kernels.MAX_TEXT_TOKENS:
        return f"it takes up to {kernels.MAX_TEXT_TOKENS} text tokens, not {num_keys}"
    if head_size > MAX_HEAD_SIZE:
        return f"it takes heads of up to {MAX_HEAD_SIZE}, not {head_size}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bfloat16, float16 and float32, not {dtype}"
    return triton_problem(device)
