# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# What triton.jit makes of a kernel is no function to a type checker.
"""Kernels of `qk_norm_rotary` and their launchers.

A row is one head of a token's q, k or v, E contiguous values; the second axis of programs is q, k,
v. A head of 72 takes the lanes of 128. Taken as 64 + 8 it needs as many instructions, since the two
parts lie differently over the threads, and memory sets the pace in either case.

Letters: N tokens, A heads, E values of a head, F = E/2 pairs, T frames, P partial sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longtake.ops.column_sum import sum_partials
from longtake.ops.elementwise import require_kernel_dtype
from longtake.ops.launch import launch
from longtake.ops.triton_language import tl, triton

# Rows in registers at once. The backward's programs run over many tiles, since each leaves partial
# sums of its own; their number depends on the shape alone, and so does the order of summation.
TILE_ROWS = 32
BACKWARD_PROGRAMS = 1024
NUM_WARPS = 4


@triton.jit
def _locate(
    tile, num_rows, part, A: tl.constexpr, E: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr
):
    """Places and mask (ROWS, W) of a tile of rows of one part."""
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, W)
    # A long video has more than 2^31 values.
    first = ((row // A * 3 + part) * A + row % A).to(tl.int64) * E
    mask = (row < num_rows)[:, None] & (column < E)[None, :]
    return first[:, None] + column[None, :], mask


@triton.jit
def _load_weight(q_weight_ptr, k_weight_ptr, part, E: tl.constexpr, W: tl.constexpr):
    column = tl.arange(0, W)
    if part == 0:
        weight = tl.load(q_weight_ptr + column, mask=column < E, other=0.0).to(tl.float32)
    else:
        weight = tl.load(k_weight_ptr + column, mask=column < E, other=0.0).to(tl.float32)
    return weight


@triton.jit
def _normalize(x, eps, E: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) of each row, and what it was multiplied by, (ROWS, 1)."""
    scale = 1 / tl.sqrt(tl.sum(x * x, axis=1) / E + eps)
    return x * scale[:, None], scale[:, None]


# even' = even cos - odd sin, odd' = odd cos + even sin; backwards with -sin
@triton.jit
def _turn(
    x,  # (ROWS, W) fp32
    sin_ptr,  # (T, F) fp32
    cos_ptr,
    tile,
    T,
    S,
    A: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    ANGLE_STRIDE: tl.constexpr,
    ONE_FRAME: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    # Where a tile never spans two frames, angles are loaded once for all of its rows.
    row = tile * ROWS + tl.arange(0, 1 if ONE_FRAME else ROWS)
    frame = row // A // S % T
    PAIRS: tl.constexpr = x.shape[1] // 2
    pair = tl.arange(0, PAIRS)
    place = frame[:, None] * ANGLE_STRIDE + pair[None, :]
    # Rows beyond the last have a frame too.
    mask = (pair < E // 2)[None, :]
    sin = tl.load(sin_ptr + place, mask=mask, other=0.0)
    cos = tl.load(cos_ptr + place, mask=mask, other=0.0)
    if BACKWARDS:
        sin = -sin
    even, odd = tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
    turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return tl.reshape(turned, (ROWS, 2 * PAIRS))


@triton.jit
def qk_norm_rotary_forward_kernel(
    x_ptr,  # (N, 3, A, E)
    out_ptr,  # (N, 3, A, E)
    q_weight_ptr,  # (E,)
    k_weight_ptr,  # (E,)
    sin_ptr,  # (T, F) fp32, or None: nothing is turned
    cos_ptr,
    num_rows,  # N A
    T,
    S,
    eps,
    A: tl.constexpr,
    E: tl.constexpr,
    W: tl.constexpr,  # the power of two from E up
    ROWS: tl.constexpr,
    ANGLE_STRIDE: tl.constexpr,
    ONE_FRAME: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    place, mask = _locate(tile, num_rows, part, A, E, W, ROWS)
    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    if part < 2:
        y, _ = _normalize(x.to(tl.float32), eps, E)
        y *= _load_weight(q_weight_ptr, k_weight_ptr, part, E, W)[None, :]
        if sin_ptr is not None:
            y = _turn(y, sin_ptr, cos_ptr, tile, T, S, A, E, ROWS, ANGLE_STRIDE, ONE_FRAME, False)
        x = y.to(x.dtype)
    tl.store(out_ptr + place, x, mask=mask)


# With xhat = scale x and g the output's gradient turned back:
# dweight = sum over rows of g xhat,  dx = scale (w g - xhat mean(w g xhat))
@triton.jit
def qk_norm_rotary_backward_kernel(
    dout_ptr,  # (N, 3, A, E)
    x_ptr,  # (N, 3, A, E)
    dx_ptr,  # (N, 3, A, E)
    partials_ptr,  # (2, P, E) fp32: of the weights' gradients
    q_weight_ptr,  # (E,)
    k_weight_ptr,  # (E,)
    sin_ptr,  # (T, F) fp32, or None
    cos_ptr,
    num_rows,  # N A
    T,
    S,
    eps,
    A: tl.constexpr,
    E: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    ANGLE_STRIDE: tl.constexpr,
    ONE_FRAME: tl.constexpr,
):
    part = tl.program_id(1)
    num_tiles = tl.cdiv(num_rows, ROWS)
    if part == 2:
        for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
            place, mask = _locate(tile, num_rows, part, A, E, W, ROWS)
            tl.store(dx_ptr + place, tl.load(dout_ptr + place, mask=mask, other=0.0), mask=mask)
    else:
        weight = _load_weight(q_weight_ptr, k_weight_ptr, part, E, W)[None, :]
        # Summed over rows once, after the loop: in it, threads need not meet.
        dweight = tl.zeros((ROWS, W), tl.float32)
        for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
            place, mask = _locate(tile, num_rows, part, A, E, W, ROWS)
            x = tl.load(x_ptr + place, mask=mask, other=0.0)
            g = tl.load(dout_ptr + place, mask=mask, other=0.0).to(tl.float32)
            xhat, scale = _normalize(x.to(tl.float32), eps, E)
            if sin_ptr is not None:
                g = _turn(
                    g, sin_ptr, cos_ptr, tile, T, S, A, E, ROWS, ANGLE_STRIDE, ONE_FRAME, True
                )
            dweight += g * xhat
            g *= weight
            mean = tl.sum(g * xhat, axis=1) / E
            dx = scale * (g - xhat * mean[:, None])
            tl.store(dx_ptr + place, dx.to(x.dtype), mask=mask)
        column = tl.arange(0, W)
        partial_ptr = partials_ptr + (part * tl.num_programs(0) + tl.program_id(0)) * E
        tl.store(partial_ptr + column, tl.sum(dweight, axis=0), mask=column < E)


def launch_forward(
    qkv: Tensor,
    q_weight_E: Tensor,
    k_weight_E: Tensor,
    sin_TF: Tensor | None,
    cos_TF: Tensor | None,
    eps: float,
) -> Tensor:
    """The output, contiguous."""
    qkv = qkv.contiguous()
    out = torch.empty_like(qkv)
    problem = _Problem(qkv, q_weight_E, k_weight_E, sin_TF, cos_TF, eps)
    if qkv.numel() > 0:
        grid = (triton.cdiv(problem.num_rows, TILE_ROWS), 3)
        launch(
            qk_norm_rotary_forward_kernel,
            grid,
            qkv,
            out,
            *problem.inputs,
            **problem.constants(TILE_ROWS),
        )
    return out


def launch_backward(
    dout: Tensor,
    qkv: Tensor,
    q_weight_E: Tensor,
    k_weight_E: Tensor,
    sin_TF: Tensor | None,
    cos_TF: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, contiguous, and those of both weights, fp32 (2, E)."""
    require_kernel_dtype(dout=dout)
    dout, qkv = dout.contiguous(), qkv.contiguous()
    dqkv = torch.empty_like(qkv)
    problem = _Problem(qkv, q_weight_E, k_weight_E, sin_TF, cos_TF, eps)
    num_programs = min(triton.cdiv(problem.num_rows, TILE_ROWS), BACKWARD_PROGRAMS)
    partials_2PE = qkv.new_empty(2, num_programs, qkv.shape[-1], dtype=torch.float32)
    if num_programs > 0:
        launch(
            qk_norm_rotary_backward_kernel,
            (num_programs, 3),
            dout,
            qkv,
            dqkv,
            partials_2PE,
            *problem.inputs,
            **problem.constants(TILE_ROWS),
        )
    return dqkv, sum_partials(partials_2PE)


class _Problem:
    """What both kernels take."""

    def __init__(
        self,
        qkv: Tensor,
        q_weight_E: Tensor,
        k_weight_E: Tensor,
        sin_TF: Tensor | None,
        cos_TF: Tensor | None,
        eps: float,
    ) -> None:
        require_kernel_dtype(qkv=qkv, q_weight=q_weight_E, k_weight=k_weight_E)
        self.num_heads, self.head_size = qkv.shape[-2:]
        self.num_rows = qkv.numel() // (3 * self.head_size)
        T, self.S, self.angle_stride = 1, 1, 0
        if sin_TF is not None and cos_TF is not None:
            T, self.S = qkv.shape[1:3]
            # The halves of one table are rows apart: no copy, only their distance.
            if not sin_TF.stride() == cos_TF.stride() == (sin_TF.stride(0), 1):
                sin_TF, cos_TF = sin_TF.contiguous(), cos_TF.contiguous()
            self.angle_stride = sin_TF.stride(0)
        weights = q_weight_E.contiguous(), k_weight_E.contiguous()
        self.inputs = (*weights, sin_TF, cos_TF, self.num_rows, T, self.S, eps)

    def constants(self, rows: int) -> dict[str, Any]:
        """The constants of a kernel with tiles of so many rows, and its warps."""
        return {
            "A": self.num_heads,
            "E": self.head_size,
            "W": triton.next_power_of_2(self.head_size),
            "ROWS": rows,
            "ANGLE_STRIDE": self.angle_stride,
            "ONE_FRAME": self.S * self.num_heads % rows == 0,
            "num_warps": NUM_WARPS,
        }
