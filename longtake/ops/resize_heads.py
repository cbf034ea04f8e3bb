# What triton.jit makes of a kernel is no function to a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Heads padded with zeros, or cut, in one pass: for kernels that take other sizes than a model's.

Letters: R rows, one of a token's heads each; E size per head, P the size that is wanted.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from longtake.ops.elementwise import picks_triton
from longtake.ops.launch import launch
from longtake.ops.triton_language import tl, triton

TILE_ROWS = 32


def resize_heads_reference(x: Tensor, size: int) -> Tensor:
    """The last dimension padded with zeros or cut to this size, contiguous."""
    return F.pad(x, (0, size - x.shape[-1])).contiguous()


@triton.jit
def _resize_heads_kernel(
    x_ptr,  # (R, E), contiguous
    out_ptr,  # (R, P)
    R,
    E: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + row * E + column, mask=(row < R) & (column < E), other=0.0)
    tl.store(out_ptr + row * P + column, x, mask=(row < R) & (column < P))


def launch_resize(x: Tensor, size: int) -> Tensor:
    """The kernel on contiguous x."""
    head_size = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], size)
    num_rows = x.numel() // head_size
    launch(
        _resize_heads_kernel,
        (triton.cdiv(num_rows, TILE_ROWS),),
        x,
        out,
        num_rows,
        E=head_size,
        P=size,
        ROWS=TILE_ROWS,
        COLUMNS=triton.next_power_of_2(max(head_size, size)),
        num_warps=4,
    )
    return out


def resize_heads(x: Tensor, size: int) -> Tensor:
    """x with its last dimension padded with zeros or cut to this size, contiguous; x itself where
    it has that size. An x that is not contiguous is copied. Not differentiable."""
    if x.shape[-1] == size:
        return x
    return (
        launch_resize(x.contiguous(), size) if picks_triton(x) else resize_heads_reference(x, size)
    )
