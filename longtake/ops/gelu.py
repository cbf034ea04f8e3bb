# What triton.jit makes of a kernel is no function to a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""The GELU between the layers of an MLP, in its tanh approximation.

gelu(x) = x * (1 + tanh(u)) / 2 = x * sigmoid(2u), with u = sqrt(2/pi) * (x + 0.044715 x^3). The
sigmoid keeps its digits where 1 + tanh would cancel.

Source: Hendrycks and Gimpel, arXiv:1606.08415. Letters: N rows, F columns, P partial sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.ops.column_sum import block_of_columns, sum_partials
from longtake.ops.elementwise import deal_rows, picks_triton, require_kernel_dtype
from longtake.ops.launch import launch
from longtake.ops.operation import operation, register_fake
from longtake.ops.triton_language import tl, triton

# The forward knows no rows: a program takes so many elements.
FORWARD_ELEMENTS = 4096
# A backward program reads so many rows of a block of columns at a time. Programs: two rounds of
# what the 132 multiprocessors of an H200 hold at once.
TILE_ROWS = 4
BACKWARD_PROGRAMS = 3072


def gelu_reference(x: Tensor) -> Tensor:
    """The tanh-approximated GELU in plain torch."""
    return F.gelu(x, approximate="tanh")


@triton.jit
def _gate(x):
    """sigmoid(2u) and d(2u)/dx: constants are 2 sqrt(2/pi), times 0.044715, times 3."""
    square = x * x
    # For large negative x the exponential is infinite and the sigmoid zero, as it should be.
    sigmoid = 1 / (1 + tl.exp(-x * (1.5957691216057308 + 0.0713548162726 * square)))
    return sigmoid, 1.5957691216057308 + 0.2140644488178 * square


@triton.jit
def _gelu_forward_kernel(
    pre_ptr,  # (elements,)
    act_ptr,  # (elements,)
    num_elements,
    ELEMENTS: tl.constexpr,
):
    # int64: an MLP's inner tensor of a long video has more than 2^31 elements.
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    x = tl.load(pre_ptr + index, mask=index < num_elements).to(tl.float32)
    sigmoid, _ = _gate(x)
    act = (x * sigmoid).to(act_ptr.dtype.element_ty)
    tl.store(act_ptr + index, act, mask=index < num_elements)


@triton.jit
def _gelu_backward_kernel(
    dact_ptr,  # (N, F)
    pre_ptr,  # (N, F)
    dpre_ptr,  # (N, F)
    act_ptr,  # (N, F) or None
    partials_ptr,  # (P, F) fp32
    N,
    F,
    rows_per_program,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Neighbouring programs take neighbouring columns, so that whole rows are read together.
    num_blocks = tl.cdiv(F, COLUMNS)
    chunk = tl.program_id(0) // num_blocks
    column = tl.program_id(0) % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    first = chunk * rows_per_program
    dbias = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, tl.minimum(first + rows_per_program, N), ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < N)[:, None] & (column < F)[None, :]
        index = row.to(tl.int64)[:, None] * F + column[None, :]
        dact = tl.load(dact_ptr + index, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(pre_ptr + index, mask=mask, other=0.0).to(tl.float32)
        sigmoid, slope = _gate(x)
        act = x * sigmoid
        dpre = dact * (sigmoid + act * (1 - sigmoid) * slope)
        dbias += tl.sum(dpre, axis=0)
        tl.store(dpre_ptr + index, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        if act_ptr is not None:
            tl.store(act_ptr + index, act.to(act_ptr.dtype.element_ty), mask=mask)
    tl.store(partials_ptr + chunk.to(tl.int64) * F + column, dbias, mask=column < F)


@operation("longtake::gelu_forward")
def _forward(pre: Tensor) -> Tensor:
    require_kernel_dtype(pre=pre)
    pre = pre.contiguous()
    act = torch.empty_like(pre)
    num_elements = pre.numel()
    launch(
        _gelu_forward_kernel,
        (triton.cdiv(num_elements, FORWARD_ELEMENTS),),
        pre,
        act,
        num_elements,
        ELEMENTS=FORWARD_ELEMENTS,
        num_warps=4,
    )
    return act


@register_fake(_forward)
def _(pre: Tensor) -> Tensor:
    return pre.new_empty(pre.shape)


@operation("longtake::gelu_backward")
def _backward(dact_NF: Tensor, pre_NF: Tensor, with_output: bool) -> tuple[Tensor, Tensor, Tensor]:
    require_kernel_dtype(dact=dact_NF, pre=pre_NF)
    dact_NF, pre_NF = dact_NF.contiguous(), pre_NF.contiguous()
    dpre_NF = torch.empty_like(pre_NF)
    act_NF = torch.empty_like(pre_NF) if with_output else None
    num_rows, width = pre_NF.shape
    columns = block_of_columns(width)
    num_warps = columns // 256 or 1
    num_blocks = -(-width // columns)
    programs = BACKWARD_PROGRAMS // num_blocks
    rows, chunks = deal_rows(num_rows, 1, multiple=TILE_ROWS, programs=programs)
    partials_PF = pre_NF.new_empty(chunks, width, dtype=torch.float32)
    launch(
        _gelu_backward_kernel,
        (chunks * num_blocks,),
        dact_NF,
        pre_NF,
        dpre_NF,
        act_NF,
        partials_PF,
        num_rows,
        width,
        rows,
        ROWS=TILE_ROWS,
        COLUMNS=columns,
        num_warps=num_warps,
    )
    dbias_F = sum_partials(partials_PF[None])[0]
    return dpre_NF, pre_NF.new_empty(0) if act_NF is None else act_NF, dbias_F


@register_fake(_backward)
def _(dact_NF: Tensor, pre_NF: Tensor, with_output: bool) -> tuple[Tensor, Tensor, Tensor]:
    act_NF = pre_NF.new_empty(pre_NF.shape if with_output else 0)
    dbias_F = pre_NF.new_empty(pre_NF.shape[1], dtype=torch.float32)
    return pre_NF.new_empty(pre_NF.shape), act_NF, dbias_F


def gelu_forward(pre_NF: Tensor) -> Tensor:
    """gelu(pre) of any shape, in its dtype, with one rounding. Not differentiable.

    A pre that is not contiguous is copied.
    """
    return _forward(pre_NF)


def gelu_backward(
    dact_NF: Tensor, pre_NF: Tensor, with_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dpre, gelu(pre) again if with_output (else an empty tensor), and dbias, float32 (F,).

    dbias, the column sums of dpre before its rounding, is the gradient of the bias of the linear
    layer that made pre. Reads dact and pre, writes dpre and act, once each. What is not contiguous
    is copied.
    """
    return _backward(dact_NF, pre_NF, with_output)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre_NF: Tensor) -> Tensor:
        ctx.save_for_backward(pre_NF)
        return gelu_forward(pre_NF)

    @staticmethod
    def backward(ctx, dact_NF: Tensor):
        (pre_NF,) = ctx.saved_tensors
        return gelu_backward(dact_NF, pre_NF, False)[0]


def gelu(x: Tensor) -> Tensor:
    """The tanh-approximated GELU, with the shape and dtype of x.

    Raises:
        ValueError: x is float64 although Triton was asked for by name.
    """
    if not picks_triton(x):
        return gelu_reference(x)
    return _Gelu.apply(x.reshape(-1, x.shape[-1])).view_as(x)
