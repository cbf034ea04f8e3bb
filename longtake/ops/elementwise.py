"""What the element-wise operations share: when kernels run, and how rows are dealt to programs.

A kernel holds a row of D values in registers as tensors with a power of two of elements. None of
384, 768 and 1152 is one, but each is a sum of two: a row is a head and a tail, and no lane is idle.

Letters: B batch, N tokens, D hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longtake.ops import kernels
from longtake.ops.triton_language import tl, triton

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows that are worth a program, which reads shift, scale or gate first and may write partial sums.
LEAST_ROWS = 4


def picks_triton(x: Tensor) -> bool:
    """Whether an element-wise operation on x runs our kernels.

    They compute in float32: "auto" leaves float64 to plain torch, and asking for Triton by name
    makes the launch refuse it.
    """
    if kernels.elementwise(x) == "reference":
        return False
    return x.dtype in KERNEL_DTYPES or kernels.current_kernels().elementwise == "triton"


def require_kernel_dtype(**tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor that the kernels' float32 arithmetic would not do justice."""
    for name, x in tensors.items():
        if x is not None and x.dtype not in KERNEL_DTYPES:
            raise ValueError(
                f"{name} is {x.dtype}, but the Triton kernels take bfloat16, float16 and float32: "
                f'set elementwise="reference"'
            )


def as_BND(x: Tensor) -> Tensor:
    """Tokens of any number of dimensions as one: (B, T, S, D) as (B, T S, D)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def contiguous_rows(row_BD: Tensor) -> Tensor:
    """Itself if each row is contiguous: a chunk of a wider product then needs no copy."""
    return row_BD if row_BD.stride(-1) == 1 else row_BD.contiguous()


def split_row(width: int) -> tuple[int, int]:
    """Head and tail, powers of two that cover the row: 1152 is 1024 + 128; a tail may be 0."""
    head = 1 << (width.bit_length() - 1)
    rest = width - head
    return head, (1 << (rest - 1).bit_length() if rest else 0)


def warps_per_row(head: int) -> int:
    """Warps that hold a row: 16 values of the head per thread, two 16-byte loads of bfloat16.

    With fewer a thread would run out of registers, with more they would share sums more often.
    """
    return min(max(head // 512, 1), 8)


def deal_rows(num_rows: int, num_samples: int, *, multiple: int, programs: int) -> tuple[int, int]:
    """(rows of a program, programs of a sample): about so many programs, each of one sample.

    A function of shapes alone, so the order of summation is, too. Rows are a multiple of what the
    kernel takes at once. There is at least one program, which writes zeros if there are no rows.
    """
    chunks = min(max(programs // max(num_samples, 1), 1), -(-num_rows // multiple)) or 1
    rows = max(-(-num_rows // (chunks * multiple)), 1) * multiple
    return rows, max(-(-num_rows // rows), 1)


@triton.jit
def sum_row(head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The sum over both parts. The head folds onto the tail, so that threads meet only once."""
    folded = tl.sum(tl.reshape(head, (TAIL, HEAD // TAIL)), axis=1)
    return tl.sum(folded + tail, axis=0)
