# What triton.jit makes of a kernel is no function to a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Sums over rows in float32, at the speed of reading: the gradients of biases.

In two stages. Each program sums a run of rows and writes partial sums, then a second kernel adds
those up. Nothing is atomic, so the same input gives the same bits.

Letters: N rows, F columns, B samples, G groups, P partial sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.ops.elementwise import (
    contiguous_rows,
    deal_rows,
    picks_triton,
    require_kernel_dtype,
)
from longtake.ops.launch import launch
from longtake.ops.operation import operation, register_fake
from longtake.ops.triton_language import tl, triton

# A program reads TILE_ROWS rows of a block of columns at a time. PROGRAMS: enough that each of the
# 132 multiprocessors of an H200 has 64 KiB on their way, few enough to leave few partial sums.
TILE_ROWS = 8
PROGRAMS = 2048
# Partial sums that a program of the second stage reads at a time.
PARTIALS_TILE = 4096
# Samples up to which sums of all and of each are one launch. Programs of each are then shaped like
# those of all, most lanes idle: of very many samples they should take longer than another launch.
SAMPLES_IN_ONE_LAUNCH = 8


def column_sum_reference(x_NF: Tensor) -> Tensor:
    """The sum over rows in plain torch, float32 (float64 for float64)."""
    return x_NF.sum(0, dtype=torch.promote_types(x_NF.dtype, torch.float32))


def block_of_columns(width: int) -> int:
    """The widest block that leaves at most an eighth of its lanes idle at the right edge."""
    for block in (512, 256):
        if -(-width // block) * block * 8 <= width * 9:
            return block
    return 128


@triton.jit
def _column_sum_kernel(
    x_ptr,  # (N, F), each row contiguous
    partials_ptr,  # (P, F) fp32
    N,
    F,
    stride_N,
    rows_per_program,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Neighbouring programs take neighbouring columns, so that whole rows are read together.
    num_blocks = tl.cdiv(F, COLUMNS)
    chunk = tl.program_id(0) // num_blocks
    column = tl.program_id(0) % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    first = chunk * rows_per_program
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, tl.minimum(first + rows_per_program, N), ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < N)[:, None] & (column < F)[None, :]
        pointers = x_ptr + row.to(tl.int64)[:, None] * stride_N + column[None, :]
        total += tl.sum(tl.load(pointers, mask=mask, other=0.0).to(tl.float32), axis=0)
    tl.store(partials_ptr + chunk.to(tl.int64) * F + column, total, mask=column < F)


@triton.jit
def _sum_partials_kernel(
    partials_ptr,  # (rows, F) fp32, contiguous: those of the first group, then of the others
    sums_ptr,  # (G, F) fp32
    P_first,
    P_other,
    F,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    num_blocks = tl.cdiv(F, COLUMNS)
    group = (tl.program_id(0) // num_blocks).to(tl.int64)
    column = tl.program_id(0) % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.where(group == 0, 0, P_first + (group - 1) * P_other)
    P = tl.where(group == 0, P_first, P_other)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, P, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < P)[:, None] & (column < F)[None, :]
        pointers = partials_ptr + (first + row)[:, None] * F + column[None, :]
        total += tl.load(pointers, mask=mask, other=0.0)
    tl.store(sums_ptr + group * F + column, tl.sum(total, axis=0), mask=column < F)


def sum_partials(partials_GPF: Tensor) -> Tensor:
    """The second stage: float32 (G, F) from contiguous partial sums."""
    num_groups, num_partials, width = partials_GPF.shape
    sums_GF = partials_GPF.new_empty(num_groups, width)
    _sum_groups(partials_GPF, sums_GF, num_partials, num_partials)
    return sums_GF


def sum_partials_of_all_and_each(partials_2BPF: Tensor) -> Tensor:
    """The second stage of two sums, float32 (1 + B, F): of the first partial sums over all samples,
    then of the second over each."""
    _, num_samples, num_partials, width = partials_2BPF.shape
    sums_GF = partials_2BPF.new_empty(1 + num_samples, width)
    num_of_all = num_samples * num_partials
    if num_samples <= SAMPLES_IN_ONE_LAUNCH:
        _sum_groups(partials_2BPF, sums_GF, num_of_all, num_partials)
    else:
        _sum_groups(partials_2BPF[0], sums_GF[:1], num_of_all, num_of_all)
        _sum_groups(partials_2BPF[1], sums_GF[1:], num_partials, num_partials)
    return sums_GF


def _sum_groups(partials: Tensor, sums_GF: Tensor, num_first: int, num_other: int) -> None:
    """Adds up so many rows for the first group, and so many for each other."""
    num_groups, width = sums_GF.shape
    # Few partial sums: wide blocks. Many: narrow ones, so that there are programs enough.
    rows = min(triton.next_power_of_2(max(num_first, num_other, 1)), 256)
    columns = min(PARTIALS_TILE // rows, 256)
    launch(
        _sum_partials_kernel,
        (num_groups * triton.cdiv(width, columns),),
        partials,
        sums_GF,
        num_first,
        num_other,
        width,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
    )


@operation("longtake::column_sum")
def _column_sum(x_NF: Tensor) -> Tensor:
    require_kernel_dtype(x=x_NF)
    x_NF = contiguous_rows(x_NF)
    num_rows, width = x_NF.shape
    columns = block_of_columns(width)
    num_warps = columns // 256 or 1
    num_blocks = -(-width // columns)
    programs = PROGRAMS // num_blocks
    rows, chunks = deal_rows(num_rows, 1, multiple=TILE_ROWS, programs=programs)
    partials_PF = x_NF.new_empty(chunks, width, dtype=torch.float32)
    launch(
        _column_sum_kernel,
        (chunks * num_blocks,),
        x_NF,
        partials_PF,
        num_rows,
        width,
        x_NF.stride(0),
        rows,
        ROWS=TILE_ROWS,
        COLUMNS=columns,
        num_warps=num_warps,
    )
    return sum_partials(partials_PF[None])[0]


@register_fake(_column_sum)
def _(x_NF: Tensor) -> Tensor:
    return x_NF.new_empty(x_NF.shape[1], dtype=torch.float32)


def column_sum(x_NF: Tensor) -> Tensor:
    """The sum over rows, float32 (F,), summed in float32. Not differentiable.

    Rows may lie apart; if they are not contiguous themselves, x is copied.
    """
    return _column_sum(x_NF) if picks_triton(x_NF) else column_sum_reference(x_NF)
