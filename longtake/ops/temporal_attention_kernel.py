"""The Triton kernels of temporal attention and their launchers.

A program computes one head of a tile of whole sequences: neighbouring places, all of their frames,
one after the other in the rows of one matrix. A mask keeps rows to their own sequence. For 16
frames in 64 rows it discards three quarters of the products, which is still the cheaper way: the
tensor cores do 64 rows in one instruction, and all loads are under way before the first is needed.

Letters: B batch, T frames, S spatial patches, A heads, E size per head; 3 is q, k and v. R are the
rows of a tile.
"""

# pyright: reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Inside of a kernel, the types that Python sees are not those that Triton compiles.

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longtake.ops.launch import launch
from longtake.ops.triton_language import tl, triton

# The most frames of a tile: float32 has no more room in registers.
MAX_FRAMES = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}
MAX_HEAD_SIZE = 128


@triton.jit
def _load(
    x_ptr,
    offset_R1,
    exists_R1,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """Rows in two parts, since a tile's width is a power of two: 72 as 64 + 8, not in 128."""
    column = tl.arange(0, MAIN)
    is_main = exists_R1 & (column < E) if MAIN > E else exists_R1
    main = tl.load(x_ptr + offset_R1 + column, mask=is_main, other=0.0)
    rest = main  # Stands for nothing.
    if REST > 0:
        column = MAIN + tl.arange(0, REST)
        rest = tl.load(x_ptr + offset_R1 + column, mask=exists_R1 & (column < E), other=0.0)
    return main, rest


@triton.jit
def _store_product(
    x_ptr,
    offset_R1,
    exists_R1,
    factor_R1,
    weights_RR,
    rows_main,
    rows_rest,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """Writes factor * (weights @ rows)."""
    column = tl.arange(0, MAIN)
    is_main = exists_R1 & (column < E) if MAIN > E else exists_R1
    product = tl.dot(weights_RR, rows_main, input_precision="ieee") * factor_R1
    tl.store(x_ptr + offset_R1 + column, product.to(x_ptr.dtype.element_ty), mask=is_main)
    if REST > 0:
        column = MAIN + tl.arange(0, REST)
        is_rest = exists_R1 & (column < E)
        product = tl.dot(weights_RR, rows_rest, input_precision="ieee") * factor_R1
        tl.store(x_ptr + offset_R1 + column, product.to(x_ptr.dtype.element_ty), mask=is_rest)


@triton.jit
def _dot_rows(a_main, a_rest, b_main, b_rest, REST: tl.constexpr):
    """Every row of a times every row of b."""
    product = tl.dot(a_main, tl.trans(b_main), input_precision="ieee")
    if REST > 0:
        product = tl.dot(a_rest, tl.trans(b_rest), product, input_precision="ieee")
    return product


@triton.jit
def _rows(
    S,
    NUM_HEADS: tl.constexpr,
    T: tl.constexpr,
    PACK: tl.constexpr,
    T_PAD: tl.constexpr,
):
    """This program's sample and head; place and frame of its rows, and which of them exist."""
    # Heads run fastest: 144 bytes of one end in the middle of a 32-byte sector, and the program
    # that needs the other half should ask for it while L2 still has it.
    head = (tl.program_id(0) % NUM_HEADS).to(tl.int64)
    first = tl.program_id(0) // NUM_HEADS * PACK
    row_R1 = tl.arange(0, PACK * T_PAD)[:, None]
    s_R1 = first + row_R1 // T_PAD
    t_R1 = row_R1 % T_PAD
    exists_R1 = s_R1 < S
    if T < T_PAD:
        exists_R1 = exists_R1 & (t_R1 < T)
    b = tl.program_id(1).to(tl.int64)
    return b, head, s_R1.to(tl.int64), t_R1.to(tl.int64), exists_R1


@triton.jit
def _exponentials(
    scores_RR,
    scale_log2,
    T: tl.constexpr,
    PACK: tl.constexpr,
    T_PAD: tl.constexpr,
):
    """exp(scale * (score - the row's highest)), 0 for other sequences; and its sums over rows."""
    row = tl.arange(0, PACK * T_PAD)
    if T < T_PAD:
        scores_RR = tl.where(row % T_PAD < T, scores_RR, float("-inf"))
    if PACK > 1:
        is_own = row[:, None] // T_PAD == row // T_PAD
        scores_RR = tl.where(is_own, scores_RR, float("-inf"))
    # Each row sees frame 0 of its place, also a row that pads, so its highest score is finite.
    highest_R1 = tl.max(scores_RR, axis=1, keep_dims=True)
    weights_RR = tl.exp2(scores_RR * scale_log2 - highest_R1 * scale_log2)
    return weights_RR, tl.sum(weights_RR, axis=1, keep_dims=True)


@triton.jit
def _temporal_attention_forward(
    qkv_ptr,  # (B, T, S, 3, A, E); strides below in units of ALIGNED elements
    out_ptr,  # (B, T, S, A, E)
    S,
    stride_b,
    stride_t,
    stride_s,
    stride_3,
    stride_a,
    scale_log2,  # log2(e) / sqrt(E)
    NUM_HEADS: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    T: tl.constexpr,
    PACK: tl.constexpr,
    T_PAD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    b, head, s_R1, t_R1, exists_R1 = _rows(S, NUM_HEADS, T, PACK, T_PAD)
    in_R1 = (t_R1 * stride_t + s_R1 * stride_s) * ALIGNED
    out_R1 = (t_R1 * S + s_R1) * (NUM_HEADS * E)
    q_ptr = qkv_ptr + (b * stride_b + head * stride_a) * ALIGNED
    k_ptr = q_ptr + tl.cast(stride_3, tl.int64) * ALIGNED
    v_ptr = k_ptr + tl.cast(stride_3, tl.int64) * ALIGNED
    out_ptr += (b * T * S * NUM_HEADS + head) * E

    q, q_rest = _load(q_ptr, in_R1, exists_R1, E, MAIN, REST)
    k, k_rest = _load(k_ptr, in_R1, exists_R1, E, MAIN, REST)
    v, v_rest = _load(v_ptr, in_R1, exists_R1, E, MAIN, REST)
    scores_RR = _dot_rows(q, q_rest, k, k_rest, REST)
    weights_RR, sum_R1 = _exponentials(scores_RR, scale_log2, T, PACK, T_PAD)
    weights_RR = weights_RR.to(q.dtype)
    inverse_R1 = 1.0 / sum_R1
    _store_product(out_ptr, out_R1, exists_R1, inverse_R1, weights_RR, v, v_rest, E, MAIN, REST)


@triton.jit
def _temporal_attention_backward(
    qkv_ptr,  # (B, T, S, 3, A, E); strides below in units of ALIGNED elements
    dout_ptr,  # (B, T, S, A, E)
    dqkv_ptr,  # (B, T, S, 3, A, E)
    S,
    stride_b,
    stride_t,
    stride_s,
    stride_3,
    stride_a,
    scale,  # 1 / sqrt(E)
    scale_log2,  # log2(e) / sqrt(E)
    NUM_HEADS: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    T: tl.constexpr,
    PACK: tl.constexpr,
    T_PAD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    b, head, s_R1, t_R1, exists_R1 = _rows(S, NUM_HEADS, T, PACK, T_PAD)
    in_R1 = (t_R1 * stride_t + s_R1 * stride_s) * ALIGNED
    dout_R1 = (t_R1 * S + s_R1) * (NUM_HEADS * E)
    dqkv_R1 = 3 * dout_R1
    q_ptr = qkv_ptr + (b * stride_b + head * stride_a) * ALIGNED
    k_ptr = q_ptr + tl.cast(stride_3, tl.int64) * ALIGNED
    v_ptr = k_ptr + tl.cast(stride_3, tl.int64) * ALIGNED
    dout_ptr += (b * T * S * NUM_HEADS + head) * E
    dq_ptr = dqkv_ptr + (b * T * S * (3 * NUM_HEADS) + head) * E
    dk_ptr = dq_ptr + NUM_HEADS * E
    dv_ptr = dk_ptr + NUM_HEADS * E

    q, q_rest = _load(q_ptr, in_R1, exists_R1, E, MAIN, REST)
    k, k_rest = _load(k_ptr, in_R1, exists_R1, E, MAIN, REST)
    v, v_rest = _load(v_ptr, in_R1, exists_R1, E, MAIN, REST)
    dout, dout_rest = _load(dout_ptr, dout_R1, exists_R1, E, MAIN, REST)

    # A row's weights are all here, so neither their sums nor rowsum(dout * out) need to be saved:
    #   ds = p * (dp - rowsum(p * dp)), dp = dout v^T; dv = p^T dout; dk = ds^T q; dq = ds k
    scores_RR = _dot_rows(q, q_rest, k, k_rest, REST)
    p_RR, sum_R1 = _exponentials(scores_RR, scale_log2, T, PACK, T_PAD)
    p_RR = p_RR * (1.0 / sum_R1)
    dp_RR = _dot_rows(dout, dout_rest, v, v_rest, REST)
    ds_RR = p_RR * (dp_RR - tl.sum(p_RR * dp_RR, axis=1, keep_dims=True))
    p_RR, ds_RR = p_RR.to(q.dtype), ds_RR.to(q.dtype)
    _store_product(dq_ptr, dqkv_R1, exists_R1, scale, ds_RR, k, k_rest, E, MAIN, REST)
    p_RR = tl.trans(p_RR)
    _store_product(dv_ptr, dqkv_R1, exists_R1, 1.0, p_RR, dout, dout_rest, E, MAIN, REST)
    ds_RR = tl.trans(ds_RR)
    _store_product(dk_ptr, dqkv_R1, exists_R1, scale, ds_RR, q, q_rest, E, MAIN, REST)


def launch_forward(qkv_BTS3AE: Tensor) -> Tensor:
    """Attention along T, contiguous (B, T, S, A, E)."""
    B, T, S, _, A, E = qkv_BTS3AE.shape
    out_BTSAE = qkv_BTS3AE.new_empty(B, T, S, A, E)
    if out_BTSAE.numel() > 0:
        qkv_BTS3AE = _with_dense_heads(qkv_BTS3AE)
        grid, strides, constants = _launch_options(qkv_BTS3AE)
        scale_log2 = math.log2(math.e) * E**-0.5
        launch(
            _temporal_attention_forward,
            grid,
            qkv_BTS3AE,
            out_BTSAE,
            S,
            *strides,
            scale_log2,
            **constants,
        )
    return out_BTSAE


def launch_backward(dout_BTSAE: Tensor, qkv_BTS3AE: Tensor) -> Tensor:
    """The gradient of qkv, contiguous (B, T, S, 3, A, E)."""
    dqkv_BTS3AE = qkv_BTS3AE.new_empty(qkv_BTS3AE.shape)
    if dqkv_BTS3AE.numel() > 0:
        qkv_BTS3AE = _with_dense_heads(qkv_BTS3AE)
        grid, strides, constants = _launch_options(qkv_BTS3AE)
        scale = qkv_BTS3AE.shape[-1] ** -0.5
        launch(
            _temporal_attention_backward,
            grid,
            qkv_BTS3AE,
            dout_BTSAE.contiguous(),
            dqkv_BTS3AE,
            qkv_BTS3AE.shape[2],
            *strides,
            scale,
            math.log2(math.e) * scale,
            **constants,
        )
    return dqkv_BTS3AE


def _with_dense_heads(qkv_BTS3AE: Tensor) -> Tensor:
    return qkv_BTS3AE if qkv_BTS3AE.stride(-1) == 1 else qkv_BTS3AE.contiguous()


def _launch_options(qkv_BTS3AE: Tensor) -> tuple[tuple[int, int], list[int], dict[str, Any]]:
    """Grid, strides and constants of a launch."""
    B, T, S, _, A, E = qkv_BTS3AE.shape
    frames = triton.next_power_of_2(T)
    # Four warps multiply 64 rows by one instruction. Without tensor cores, float32 needs many
    # registers: beyond 32 frames, and with heads over 80, some of them run over into memory.
    is_half = qkv_BTS3AE.dtype != torch.float32
    rows = max(64 if is_half else 32, frames)
    main = max(16, triton.next_power_of_2(E + 1) // 2)  # the largest power of two up to E
    rest = max(0, E - main)
    # Heads begin at multiples of so many elements: 16 bytes are then one access.
    strides = qkv_BTS3AE.stride()[:-1]
    aligned = math.gcd(16 // qkv_BTS3AE.element_size(), E, *strides)
    constants = {
        "NUM_HEADS": A,
        "E": E,
        "MAIN": main,
        "REST": max(16, triton.next_power_of_2(rest)) if rest else 0,
        "T": T,
        "PACK": rows // frames,
        "T_PAD": frames,
        "ALIGNED": aligned,
        "num_warps": rows // 16 if is_half else 8,
    }
    grid = (math.ceil(S / constants["PACK"]) * A, B)
    return grid, [stride // aligned for stride in strides], constants
