"""Self-attention of all tokens, by our own Triton kernels that do not pad a head of 72 to 128.

They read q, k and v where the QKV product lies, and write its gradient as one tensor.

Letters: B batch, N tokens, R the same rounded up to whole tiles, A heads, E size per head; 3 is q,
k and v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtake.ops.attended import keeps_attended
from longtake.ops.flash_attention_kernel import (
    flash_attention_forward,
    flash_attention_key_value_gradient,
    flash_attention_query_gradient,
)
from longtake.ops.kernels import triton_problem
from longtake.ops.launch import launch
from longtake.ops.operation import operation, register_autograd, register_fake
from longtake.ops.plain_attention import attention_reference
from longtake.ops.triton_language import triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_SIZE = 128


@dataclass(frozen=True)
class Tiles:
    """What a program holds of the scores at a time, and the means it has for that."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    """Blocks of the inner loop on chip. With two, a block is loaded only when the one before it is
    done with: other programs have to fill the wait. With three, it has been loaded by then."""


# Measured with heads of 72 on an H100, at 256, 1024, 4096 and 16,384 tokens. Short sequences want
# several small programs on a multiprocessor, since each spends much of its time on its first loads
# and last stores; long ones want large programs, which read the others' rows less often. What
# decides how many fit are registers, 65,536 of them.
SHORT = 512
MEDIUM = 2048


def forward_tiles(num_tokens: int, head_size: int, dtype: torch.dtype) -> Tiles:
    """Two programs share a multiprocessor: one multiplies while the other takes exponentials."""
    if dtype == torch.float32:  # no tensor cores
        return Tiles(queries=32, keys=16, num_warps=8, num_stages=2)
    if num_tokens <= 64:
        return Tiles(queries=64, keys=64, num_warps=4, num_stages=2)
    return Tiles(queries=128, keys=64, num_warps=4 if head_size <= 80 else 8, num_stages=3)


def query_gradient_tiles(num_tokens: int, head_size: int, dtype: torch.dtype) -> Tiles:
    """Three programs of 64 queries share a multiprocessor, or two of 128 with few keys at a time,
    or one of 128 has it alone."""
    if dtype == torch.float32:
        return Tiles(queries=32, keys=16, num_warps=8, num_stages=2)
    if num_tokens <= SHORT:
        return Tiles(queries=64, keys=64, num_warps=4, num_stages=2)
    if head_size > 96:
        return Tiles(queries=128, keys=64, num_warps=8, num_stages=3)
    if num_tokens <= MEDIUM:
        return Tiles(queries=128, keys=32, num_warps=8, num_stages=3)
    return Tiles(queries=128, keys=128, num_warps=8, num_stages=3)


def key_value_gradient_tiles(num_tokens: int, head_size: int, dtype: torch.dtype) -> Tiles:
    """Here programs own keys, with two sums per row: small ones share a multiprocessor at any
    length, while heads that fill its registers leave room for one of twice the keys."""
    if dtype == torch.float32:
        return Tiles(queries=16, keys=32, num_warps=8, num_stages=2)
    if head_size > 96:
        return Tiles(queries=32, keys=128, num_warps=8, num_stages=3)
    if num_tokens <= SHORT:
        return Tiles(queries=32, keys=64, num_warps=4, num_stages=3)
    if head_size > 80:
        return Tiles(queries=64, keys=128, num_warps=8, num_stages=3)
    return Tiles(queries=64, keys=64, num_warps=4, num_stages=3)


def flash_attention_reference(qkv_BN3AE: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v with explicit scores in at least float32, contiguous."""
    return attention_reference(*qkv_BN3AE.unbind(2)).contiguous()


def launch_forward(qkv_BN3AE: Tensor, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm to base 2 of the sum of each query's exponentials."""
    B, N, _, A, E = qkv_BN3AE.shape
    tiles = tiles or forward_tiles(N, E, qkv_BN3AE.dtype)
    out_BNAE, lse_BAR = _empty_outputs(qkv_BN3AE, tiles)
    if out_BNAE.numel() == 0:
        return out_BNAE, lse_BAR
    qkv_BN3AE = _readable(qkv_BN3AE)
    launch(
        flash_attention_forward,
        (B * A * math.ceil(N / tiles.queries),),
        qkv_BN3AE,
        out_BNAE,
        lse_BAR,
        N,
        lse_BAR.shape[-1],
        qkv_BN3AE.stride(0),
        math.log2(math.e) * E**-0.5,
        **_launch_options(qkv_BN3AE, tiles),
    )
    return out_BNAE, lse_BAR


def launch_backward(
    dout_BNAE: Tensor,
    qkv_BN3AE: Tensor,
    out_BNAE: Tensor,
    lse_BAR: Tensor,
    *,
    query_tiles: Tiles | None = None,
    key_value_tiles: Tiles | None = None,
) -> Tensor:
    """The gradient of qkv, contiguous."""
    B, N, _, A, E = qkv_BN3AE.shape
    R = lse_BAR.shape[-1]
    dqkv_BN3AE = qkv_BN3AE.new_empty(qkv_BN3AE.shape)
    if dqkv_BN3AE.numel() == 0:
        return dqkv_BN3AE
    dout_BNAE, qkv_BN3AE = dout_BNAE.contiguous(), _readable(qkv_BN3AE)
    query_tiles = query_tiles or query_gradient_tiles(N, E, qkv_BN3AE.dtype)
    key_value_tiles = key_value_tiles or key_value_gradient_tiles(N, E, qkv_BN3AE.dtype)
    for tiles in (query_tiles, key_value_tiles):
        assert R % tiles.queries == 0, f"{tiles} reach beyond the {R} rows that forward wrote"
    delta_BAR = torch.empty_like(lse_BAR)
    scale = E**-0.5
    numbers = (N, R, qkv_BN3AE.stride(0), scale, math.log2(math.e) * scale)
    # In this order: the first also writes delta, which the second reads.
    launch(
        flash_attention_query_gradient,
        (B * A * math.ceil(N / query_tiles.queries),),
        dout_BNAE,
        out_BNAE,
        qkv_BN3AE,
        lse_BAR,
        delta_BAR,
        dqkv_BN3AE,
        *numbers,
        **_launch_options(qkv_BN3AE, query_tiles),
    )
    launch(
        flash_attention_key_value_gradient,
        (B * A * math.ceil(N / key_value_tiles.keys),),
        dout_BNAE,
        qkv_BN3AE,
        lse_BAR,
        delta_BAR,
        dqkv_BN3AE,
        *numbers,
        **_launch_options(qkv_BN3AE, key_value_tiles),
    )
    return dqkv_BN3AE


def _empty_outputs(qkv_BN3AE: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    B, N, _, A, E = qkv_BN3AE.shape
    R = (N + tiles.queries - 1) // tiles.queries * tiles.queries
    return qkv_BN3AE.new_empty(B, N, A, E), qkv_BN3AE.new_empty(B, A, R, dtype=torch.float32)


def _readable(qkv_BN3AE: Tensor) -> Tensor:
    """The tensor, or a copy if the kernels could not read it where it lies."""
    fits_int32 = qkv_BN3AE.stride(1) < 2**23  # times the rows of a tile
    return qkv_BN3AE if qkv_BN3AE.stride(-1) == 1 and fits_int32 else qkv_BN3AE.contiguous()


def _launch_options(qkv_BN3AE: Tensor, tiles: Tiles) -> dict[str, Any]:
    """What the three kernels are compiled for."""
    _, N, _, A, E = qkv_BN3AE.shape
    main = max(16, triton.next_power_of_2(E + 1) // 2)  # the largest power of two up to E
    tail = max(0, E - main)
    return {
        "stride_N": qkv_BN3AE.stride(1),
        "stride_3": qkv_BN3AE.stride(2),
        "stride_A": qkv_BN3AE.stride(3),
        "A": A,
        "E": E,
        "MAIN": main,
        "TAIL": max(16, triton.next_power_of_2(tail)) if tail else 0,
        "BLOCK_Q": tiles.queries,
        "BLOCK_K": tiles.keys,
        "EVEN_Q": N % tiles.queries == 0,
        "EVEN_K": N % tiles.keys == 0,
        # Otherwise float32 would be rounded to 10 bits of mantissa.
        "PRECISION": "ieee",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


@operation("longtake::flash_attention")
@keeps_attended
def _flash_attention(
    qkv_BN3AE: Tensor,  # (B, N, 3, A, E), any strides; a dense last dimension saves a copy
) -> tuple[Tensor, Tensor]:
    """out (B, N, A, E), contiguous, and what the backward needs of each row of scores (B, A, R)."""
    return launch_forward(qkv_BN3AE)


@register_fake(_flash_attention)
def _(qkv_BN3AE: Tensor) -> tuple[Tensor, Tensor]:
    _, N, _, _, E = qkv_BN3AE.shape
    return _empty_outputs(qkv_BN3AE, forward_tiles(N, E, qkv_BN3AE.dtype))


@operation("longtake::flash_attention_backward")
def _flash_attention_backward(
    dout_BNAE: Tensor,  # (B, N, A, E)
    qkv_BN3AE: Tensor,  # (B, N, 3, A, E)
    out_BNAE: Tensor,  # (B, N, A, E), contiguous
    lse_BAR: Tensor,  # (B, A, R)
) -> Tensor:
    """The gradient of qkv, (B, N, 3, A, E) and contiguous."""
    return launch_backward(dout_BNAE, qkv_BN3AE, out_BNAE, lse_BAR)


@register_fake(_flash_attention_backward)
def _(dout_BNAE: Tensor, qkv_BN3AE: Tensor, out_BNAE: Tensor, lse_BAR: Tensor) -> Tensor:
    return qkv_BN3AE.new_empty(qkv_BN3AE.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout_BNAE: Tensor | None, _: Tensor | None) -> Tensor | None:
    if dout_BNAE is None:
        return None
    return _flash_attention_backward(dout_BNAE, *ctx.saved_tensors)


register_autograd(_flash_attention, _backward, setup_context=_save_for_backward)


def flash_problem(head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot run on these, or None if they can."""
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"it computes in bfloat16, float16 or float32, not {name}"
    if head_size > MAX_HEAD_SIZE:
        return f"it takes heads up to {MAX_HEAD_SIZE}, not {head_size}"
    return triton_problem(device)


def flash_attention(qkv_BN3AE: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v of tokens among themselves, (B, N, A, E), contiguous, in the dtype
    of qkv; the softmax is float32.

    Raises:
        ValueError: these are not q, k and v side by side, or the kernels cannot run on them.
    """
    if qkv_BN3AE.ndim != 5 or qkv_BN3AE.shape[2] != 3:
        raise ValueError(
            f"flash attention got qkv of shape {tuple(qkv_BN3AE.shape)}, but expects (batch, "
            f"tokens, 3, heads, head size): unflatten the last dimension of the QKV product into "
            f"(3, heads, head size)"
        )
    problem = flash_problem(qkv_BN3AE.shape[-1], qkv_BN3AE.dtype, qkv_BN3AE.device)
    if problem:
        raise ValueError(f'attention by "triton" cannot run here: {problem}; use "auto" or "sdpa"')
    return _flash_attention(qkv_BN3AE)[0]
