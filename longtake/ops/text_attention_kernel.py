"""Triton kernels of attention of very many queries to few keys, and their launchers.

All keys and values of a head fit on chip: a program loads them once and then runs over its share of
the queries, each needing one softmax over the whole row. Queries, outputs and their gradients pass
once, where they lie. A head of 72 is taken as 64 + 8 columns, the 8 padded to 16: padding all of it
would mean 128.

Letters: B batch, N queries, L keys, A heads, E size per head.
"""

# Triton's own types say little about what a kernel may do.
# pyright: reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.ops.launch import launch
from longtake.ops.triton_language import tl, triton

MAX_HEAD_SIZE = 128
LOG2_E = 1.4426950408889634


@triton.jit
def _tile(rows, stride, is_row, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):
    """Offsets of a head's columns from FIRST on in these rows, and which of them are there."""
    columns = FIRST + tl.arange(0, WIDTH)
    is_there = is_row[:, None]
    if FIRST + WIDTH > E:
        is_there = is_there & (columns < E)[None, :]
    return rows[:, None] * stride + columns[None, :], is_there


@triton.jit
def _load(base, rows, stride, is_row, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):
    """Zeros where nothing is."""
    offsets, is_there = _tile(rows, stride, is_row, FIRST, WIDTH, E)
    return tl.load(base + offsets, mask=is_there, other=0.0)


@triton.jit
def _store(
    base, rows, stride, is_row, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, values
):
    offsets, is_there = _tile(rows, stride, is_row, FIRST, WIDTH, E)
    tl.store(base + offsets, values, mask=is_there)


@triton.jit
def _valid_keys(mask, batch, keys, L):
    is_valid = keys < L
    if mask is not None:
        is_valid = is_valid & tl.load(mask + batch * L + keys, mask=is_valid, other=0).to(tl.int1)
    return is_valid


@triton.jit
def _forward_kernel(
    q,  # (B, N, A, E)
    kv,  # (B, L, 2, A, E)
    mask,  # (B, L) or None
    out,  # (B, N, A, E) contiguous
    lse,  # (B, A, N), natural logarithm; 0 where no key is valid
    N,
    L,
    q_stride_B,
    q_stride_N,
    kv_stride_B,
    kv_stride_L,
    kv_stride_2,
    scale_log2,  # log2(e) / sqrt(E)
    blocks_per_program,
    # Heads lie 72 apart: only as a constant is that known to keep 16-byte loads aligned.
    q_stride_A: tl.constexpr,
    kv_stride_A: tl.constexpr,
    A: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    LN_2: tl.constexpr = 0.6931471805599453
    # Neighbouring heads run side by side: their rows share cache lines.
    head = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    keys = tl.arange(0, KEYS)
    queries = tl.arange(0, BLOCK)

    k = kv + batch * kv_stride_B + head * kv_stride_A
    v = k + kv_stride_2
    # Keys that may not be seen count as zeros, whatever they hold.
    is_valid = _valid_keys(mask, batch, keys, L)
    k_main = _load(k, keys, kv_stride_L, is_valid, 0, MAIN, E)
    v_main = _load(v, keys, kv_stride_L, is_valid, 0, MAIN, E)
    if TAIL > 0:
        k_tail = _load(k, keys, kv_stride_L, is_valid, MAIN, TAIL, E)
        v_tail = _load(v, keys, kv_stride_L, is_valid, MAIN, TAIL, E)
    bias = tl.where(is_valid, 0.0, float("-inf"))

    q += batch * q_stride_B + head * q_stride_A
    out += batch * N * (A * E) + head * E
    lse += (batch * A + head) * N
    first = tl.program_id(1) * blocks_per_program
    last = tl.minimum(first + blocks_per_program, tl.cdiv(N, BLOCK))
    for block in tl.range(first, last):
        start = tl.cast(block * BLOCK, tl.int64)
        is_query = queries < N - block * BLOCK
        q_block = q + start * q_stride_N
        scores = tl.dot(
            _load(q_block, queries, q_stride_N, is_query, 0, MAIN, E),
            tl.trans(k_main),
            input_precision=PRECISION,
        )
        if TAIL > 0:
            scores = tl.dot(
                _load(q_block, queries, q_stride_N, is_query, MAIN, TAIL, E),
                tl.trans(k_tail),
                scores,
                input_precision=PRECISION,
            )
        scores += bias[None, :]
        highest = tl.max(scores, axis=1) * scale_log2
        # Without a valid key all scores are -inf, and so must the exponents be, not NaN.
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores * scale_log2 - highest[:, None])
        total = tl.sum(weights, axis=1)
        is_empty = total == 0.0
        total = tl.where(is_empty, 1.0, total)
        # The weights are at most 1 and divided last, in float32.
        over_total = tl.where(is_empty, 0.0, 1.0 / total)
        weights = weights.to(v_main.dtype)
        out_block = out + start * (A * E)
        out_main = tl.dot(weights, v_main, input_precision=PRECISION) * over_total[:, None]
        _store(out_block, queries, A * E, is_query, 0, MAIN, E, out_main)
        if TAIL > 0:
            out_tail = tl.dot(weights, v_tail, input_precision=PRECISION) * over_total[:, None]
            _store(out_block, queries, A * E, is_query, MAIN, TAIL, E, out_tail)
        log_total = (highest + tl.log2(total)) * LN_2
        tl.store(lse + start + queries, log_total, mask=is_query)


@triton.jit
def _backward_kernel(
    dout,  # (B, N, A, E)
    q,  # (B, N, A, E)
    kv,  # (B, L, 2, A, E)
    mask,  # (B, L) or None
    lse,  # (B, A, N)
    delta,  # (B, A, N), what the part with dq leaves for the part with dkv, or None
    dq,  # (B, N, A, E) contiguous
    dkv,  # (splits, B, L, 2, A, E) contiguous: each program's sum over its queries
    N,
    L,
    dout_stride_B,
    dout_stride_N,
    q_stride_B,
    q_stride_N,
    kv_stride_B,
    kv_stride_L,
    kv_stride_2,
    scale,  # 1 / sqrt(E)
    blocks_per_program,
    dout_stride_A: tl.constexpr,
    q_stride_A: tl.constexpr,
    kv_stride_A: tl.constexpr,
    A: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    WITH_DQ: tl.constexpr,
    WITH_DKV: tl.constexpr,
):
    """With P = softmax(q k^T scale): dv = P^T dout, dS = P (dout v^T - rowsum(P dout v^T)),
    dq = dS k scale, dk = dS^T q scale.

    Scores are kept with keys in rows: then P^T and dS^T enter their products from registers.
    Both parts at once need all keys in the tile; the part with dkv alone takes any of them.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1) // tl.cdiv(L, KEYS)
    keys = tl.program_id(1) % tl.cdiv(L, KEYS) * KEYS + tl.arange(0, KEYS)
    queries = tl.arange(0, BLOCK)

    k = kv + batch * kv_stride_B + head * kv_stride_A
    v = k + kv_stride_2
    # Keys that may not be seen count as zeros, whatever they hold.
    is_valid = _valid_keys(mask, batch, keys, L)
    k_main = _load(k, keys, kv_stride_L, is_valid, 0, MAIN, E)
    v_main = _load(v, keys, kv_stride_L, is_valid, 0, MAIN, E)
    if TAIL > 0:
        k_tail = _load(k, keys, kv_stride_L, is_valid, MAIN, TAIL, E)
        v_tail = _load(v, keys, kv_stride_L, is_valid, MAIN, TAIL, E)
    if WITH_DKV:
        dk_main = tl.zeros((KEYS, MAIN), tl.float32)
        dv_main = tl.zeros((KEYS, MAIN), tl.float32)
        if TAIL > 0:
            dk_tail = tl.zeros((KEYS, TAIL), tl.float32)
            dv_tail = tl.zeros((KEYS, TAIL), tl.float32)

    q += batch * q_stride_B + head * q_stride_A
    dout += batch * dout_stride_B + head * dout_stride_A
    dq += batch * N * (A * E) + head * E
    lse += (batch * A + head) * N
    if delta is not None:
        delta += (batch * A + head) * N
    first = split * blocks_per_program
    last = tl.minimum(first + blocks_per_program, tl.cdiv(N, BLOCK))
    for block in tl.range(first, last):
        start = tl.cast(block * BLOCK, tl.int64)
        is_query = queries < N - block * BLOCK
        q_block = q + start * q_stride_N
        dout_block = dout + start * dout_stride_N
        q_main = _load(q_block, queries, q_stride_N, is_query, 0, MAIN, E)
        dout_main = _load(dout_block, queries, dout_stride_N, is_query, 0, MAIN, E)
        if TAIL > 0:
            q_tail = _load(q_block, queries, q_stride_N, is_query, MAIN, TAIL, E)
            dout_tail = _load(dout_block, queries, dout_stride_N, is_query, MAIN, TAIL, E)
        # Beyond the last query +inf makes all weights zero.
        log_total = tl.load(lse + start + queries, mask=is_query, other=float("inf"))

        scores = tl.dot(k_main, tl.trans(q_main), input_precision=PRECISION)
        dweights = tl.dot(v_main, tl.trans(dout_main), input_precision=PRECISION)
        if TAIL > 0:
            scores = tl.dot(k_tail, tl.trans(q_tail), scores, input_precision=PRECISION)
            dweights = tl.dot(v_tail, tl.trans(dout_tail), dweights, input_precision=PRECISION)
        exponents = scores * (scale * LOG2_E) - (log_total * LOG2_E)[None, :]
        weights = tl.exp2(tl.where(is_valid[:, None], exponents, float("-inf")))
        if WITH_DKV:
            rounded = weights.to(q_main.dtype)
            dv_main = tl.dot(rounded, dout_main, dv_main, input_precision=PRECISION)
            if TAIL > 0:
                dv_tail = tl.dot(rounded, dout_tail, dv_tail, input_precision=PRECISION)
        if WITH_DQ:
            row_sum = tl.sum(weights * dweights, axis=0)
            if not WITH_DKV:
                tl.store(delta + start + queries, row_sum, mask=is_query)
        else:
            row_sum = tl.load(delta + start + queries, mask=is_query, other=0.0)
        dscores = (weights * (dweights - row_sum[None, :])).to(q_main.dtype)
        if WITH_DKV:
            dk_main = tl.dot(dscores, q_main, dk_main, input_precision=PRECISION)
            if TAIL > 0:
                dk_tail = tl.dot(dscores, q_tail, dk_tail, input_precision=PRECISION)
        if WITH_DQ:
            dscores = tl.trans(dscores)
            dq_block = dq + start * (A * E)
            dq_main = tl.dot(dscores, k_main, input_precision=PRECISION) * scale
            _store(dq_block, queries, A * E, is_query, 0, MAIN, E, dq_main)
            if TAIL > 0:
                dq_tail = tl.dot(dscores, k_tail, input_precision=PRECISION) * scale
                _store(dq_block, queries, A * E, is_query, MAIN, TAIL, E, dq_tail)

    if WITH_DKV:
        dkv += (split.to(tl.int64) * tl.num_programs(2) + batch) * L * (2 * A * E) + head * E
        _store(dkv, keys, 2 * A * E, keys < L, 0, MAIN, E, dk_main * scale)
        _store(dkv + A * E, keys, 2 * A * E, keys < L, 0, MAIN, E, dv_main)
        if TAIL > 0:
            _store(dkv, keys, 2 * A * E, keys < L, MAIN, TAIL, E, dk_tail * scale)
            _store(dkv + A * E, keys, 2 * A * E, keys < L, MAIN, TAIL, E, dv_tail)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a kernel is cut."""

    keys: int  # in a tile
    block: int  # queries in a tile
    num_warps: int
    num_stages: int
    programs_per_sm: int

    @property
    def launch(self) -> dict[str, int]:
        """Options of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def forward_tiles(num_keys: int, columns: int, dtype: torch.dtype) -> Tiles:
    """The tiles of the forward kernel."""
    keys = _padded(num_keys)
    if dtype == torch.float32:
        num_warps = 4 if keys <= 128 else 8
        return Tiles(keys=keys, block=16, num_warps=num_warps, num_stages=1, programs_per_sm=1)
    if keys > 128 or columns > 80:
        return Tiles(keys=keys, block=64, num_warps=8, num_stages=1, programs_per_sm=1)
    # Three stages hide the loads better than a third program on the multiprocessor (0.17 against
    # 0.19 ms for 65,536 queries on an H100), which takes a cap on registers to fit.
    return Tiles(keys=keys, block=64, num_warps=4, num_stages=3, programs_per_sm=2)


def backward_tiles(
    num_keys: int, columns: int, dtype: torch.dtype
) -> tuple[Tiles, Tiles] | tuple[Tiles]:
    """The tiles of the kernel with all gradients, or, where its sums would overflow the registers,
    of the one with dq and the one with dk and dv."""
    keys = _padded(num_keys)
    if dtype == torch.float32:
        return (
            Tiles(keys=keys, block=16, num_warps=8, num_stages=1, programs_per_sm=1),
            Tiles(keys=64, block=16, num_warps=8, num_stages=1, programs_per_sm=1),
        )
    if keys > 128 or columns > 80:
        return (
            Tiles(keys=keys, block=64, num_warps=8, num_stages=2, programs_per_sm=1),
            Tiles(keys=128, block=64, num_warps=8, num_stages=2, programs_per_sm=1),
        )
    return (Tiles(keys=keys, block=64, num_warps=8, num_stages=3, programs_per_sm=1),)


def launch_forward(
    q_BNAE: Tensor, kv_BL2AE: Tensor, key_mask_BL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse): (B, N, A, E) like q and float32 (B, A, N)."""
    q_BNAE, kv_BL2AE = _with_dense_heads(q_BNAE), _with_dense_heads(kv_BL2AE)
    B, N, A, E = q_BNAE.shape
    L = kv_BL2AE.shape[1]
    out_BNAE = q_BNAE.new_empty(B, N, A, E)
    lse_BAN = q_BNAE.new_empty(B, A, N, dtype=torch.float32)
    main, tail = _head_columns(E)
    tiles = forward_tiles(L, main + tail, q_BNAE.dtype)
    splits, blocks_per_program = _split_queries(N, B * A, tiles, q_BNAE.device)
    launch(
        _forward_kernel,
        (A, splits, B),
        q_BNAE,
        kv_BL2AE,
        _dense_mask(key_mask_BL),
        out_BNAE,
        lse_BAN,
        N,
        L,
        *q_BNAE.stride()[:2],
        *kv_BL2AE.stride()[:3],
        E**-0.5 * LOG2_E,
        blocks_per_program,
        q_stride_A=q_BNAE.stride(2),
        kv_stride_A=kv_BL2AE.stride(3),
        A=A,
        E=E,
        MAIN=main,
        TAIL=tail,
        KEYS=tiles.keys,
        BLOCK=tiles.block,
        PRECISION=_precision(q_BNAE.dtype),
        **tiles.launch,
    )
    return out_BNAE, lse_BAN


def launch_backward(
    dout_BNAE: Tensor,
    q_BNAE: Tensor,
    kv_BL2AE: Tensor,
    key_mask_BL: Tensor | None,
    lse_BAN: Tensor,
) -> tuple[Tensor, Tensor]:
    """(dq, dkv), contiguous."""
    dout_BNAE, q_BNAE, kv_BL2AE = map(_with_dense_heads, (dout_BNAE, q_BNAE, kv_BL2AE))
    B, N, A, E = q_BNAE.shape
    L = kv_BL2AE.shape[1]
    main, tail = _head_columns(E)
    parts = backward_tiles(L, main + tail, q_BNAE.dtype)
    dq_BNAE = q_BNAE.new_empty(B, N, A, E)
    delta_BAN = torch.empty_like(lse_BAN) if len(parts) > 1 else None
    dkv = dq_BNAE  # for the part that leaves it alone
    for part, tiles in enumerate(parts):
        with_dkv = part == len(parts) - 1
        num_tiles = _ceil_div(L, tiles.keys)
        splits, blocks_per_program = _split_queries(N, B * A * num_tiles, tiles, q_BNAE.device)
        if with_dkv:
            # Programs write sums of their own, added in a fixed order below: the same every run.
            dtype = q_BNAE.dtype if splits == 1 else torch.float32
            dkv = q_BNAE.new_empty(splits, B, L, 2, A, E, dtype=dtype)
        launch(
            _backward_kernel,
            (A, splits * num_tiles, B),
            dout_BNAE,
            q_BNAE,
            kv_BL2AE,
            _dense_mask(key_mask_BL),
            lse_BAN,
            delta_BAN,
            dq_BNAE,
            dkv,
            N,
            L,
            *dout_BNAE.stride()[:2],
            *q_BNAE.stride()[:2],
            *kv_BL2AE.stride()[:3],
            E**-0.5,
            blocks_per_program,
            dout_stride_A=dout_BNAE.stride(2),
            q_stride_A=q_BNAE.stride(2),
            kv_stride_A=kv_BL2AE.stride(3),
            A=A,
            E=E,
            MAIN=main,
            TAIL=tail,
            KEYS=tiles.keys,
            BLOCK=tiles.block,
            PRECISION=_precision(q_BNAE.dtype),
            WITH_DQ=part == 0,
            WITH_DKV=with_dkv,
            **tiles.launch,
        )
    dkv_BL2AE = dkv[0] if dkv.shape[0] == 1 else dkv.sum(dim=0).to(q_BNAE.dtype)
    return dq_BNAE, dkv_BL2AE


def _with_dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense_mask(key_mask_BL: Tensor | None) -> Tensor | None:
    return None if key_mask_BL is None else key_mask_BL.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """float32 products are not to be rounded to TF32; it has no meaning for the other types."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _padded(num_keys: int) -> int:
    """A matrix instruction takes 64 rows."""
    return max(64, _power_of_2_from(num_keys))


def _head_columns(head_size: int) -> tuple[int, int]:
    """A head's columns as powers of two that a matrix instruction takes: (main, tail)."""
    main = max(16, 1 << (head_size.bit_length() - 1))
    rest = head_size - main
    return main, 0 if rest <= 0 else max(16, _power_of_2_from(rest))


def _split_queries(
    num_queries: int, rows: int, tiles: Tiles, device: torch.device
) -> tuple[int, int]:
    """Among how many programs to split the queries of each row of programs: (splits, blocks)."""
    blocks = _ceil_div(num_queries, tiles.block)
    splits = _best_splits(rows, blocks, _num_sms(device) * tiles.programs_per_sm)
    blocks_per_program = _ceil_div(blocks, splits)
    return _ceil_div(blocks, blocks_per_program), blocks_per_program


@functools.cache
def _best_splits(rows: int, blocks: int, slots: int) -> int:
    """The split with which all programs end soonest, when `slots` of them run at a time and what
    a program does once takes as long as two blocks."""

    def time(splits: int) -> int:
        return _ceil_div(rows * splits, slots) * (_ceil_div(blocks, splits) + 2)

    return min(range(1, min(blocks, slots) + 1), key=time)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2_from(a: int) -> int:
    """The smallest that is not less."""
    return 1 << (a - 1).bit_length()


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
