# What triton.jit makes of a kernel is no function to a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""The end of every branch of a block: its output joins the residual stream through a gate.

Letters: B batch, N tokens, D hidden size, P programs that share a sample, G = 1 + B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.ops.column_sum import (
    column_sum,
    sum_partials,
    sum_partials_of_all_and_each,
)
from longtake.ops.elementwise import (
    LEAST_ROWS,
    as_BND,
    contiguous_rows,
    deal_rows,
    picks_triton,
    require_kernel_dtype,
    split_row,
    warps_per_row,
)
from longtake.ops.launch import launch
from longtake.ops.operation import operation, register_fake
from longtake.ops.row_per_sample import row_per_sample
from longtake.ops.triton_language import tl, triton

# One or two rounds of what the 132 multiprocessors of an H200 hold at once; few enough that what a
# program reads (a gate) and writes (partial sums) beside its rows is little. STAGES: two rows are
# on their way to shared memory while threads, their registers full of sums, work on a third.
FORWARD_PROGRAMS = 4096
BACKWARD_PROGRAMS = 1536
STAGES = 3


def gated_residual_reference(x_BND: Tensor, gate_B1D: Tensor, y_BND: Tensor) -> Tensor:
    """x + gate * y in plain torch."""
    return (x_BND + gate_B1D * y_BND).to(x_BND.dtype)


@triton.jit
def _gated_residual_forward_kernel(
    x_ptr,  # (B, N, D)
    gate_ptr,  # (B, D), rows gate_stride apart, or None
    y_ptr,  # (B, N, D)
    out_ptr,  # (B, N, D)
    N,
    gate_stride,
    rows_per_program,
    programs_per_sample,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    b = (tl.program_id(0) // programs_per_sample).to(tl.int64)
    first = tl.program_id(0) % programs_per_sample * rows_per_program
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL if TAIL > 0 else 1)
    in_row = tail < D
    if gate_ptr is not None:
        gate_ptr += b * gate_stride
        head_gate = tl.load(gate_ptr + head).to(tl.float32)
        tail_gate = tl.load(gate_ptr + tail, mask=in_row, other=0.0).to(tl.float32)
    else:
        head_gate = 1.0
        tail_gate = 1.0
    for n in range(first, tl.minimum(first + rows_per_program, N)):
        start = (b * N + n) * D
        x = tl.load(x_ptr + start + head).to(tl.float32)
        y = tl.load(y_ptr + start + head).to(tl.float32)
        tl.store(out_ptr + start + head, x + head_gate * y)
        if TAIL > 0:
            x = tl.load(x_ptr + start + tail, mask=in_row, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + start + tail, mask=in_row, other=0.0).to(tl.float32)
            tl.store(out_ptr + start + tail, x + tail_gate * y, mask=in_row)


@triton.jit
def _gated_residual_backward_kernel(
    dout_ptr,  # (B, N, D)
    gate_ptr,  # (B, D), rows gate_stride apart
    y_ptr,  # (B, N, D) or None
    dy_ptr,  # (B, N, D)
    partials_ptr,  # (2, B, P, D) fp32: of dbias, of dgate; only the first without y
    N,
    gate_stride,
    rows_per_program,
    programs_per_sample,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
):
    b = (tl.program_id(0) // programs_per_sample).to(tl.int64)
    first = tl.program_id(0) % programs_per_sample * rows_per_program
    gate_ptr += b * gate_stride
    head = tl.arange(0, HEAD)
    head_gate = tl.load(gate_ptr + head).to(tl.float32)
    head_dbias = tl.zeros((HEAD,), tl.float32)
    head_dgate = tl.zeros((HEAD,), tl.float32)
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)
        in_row = tail < D
        tail_gate = tl.load(gate_ptr + tail, mask=in_row, other=0.0).to(tl.float32)
        tail_dbias = tl.zeros((TAIL,), tl.float32)
        tail_dgate = tl.zeros((TAIL,), tl.float32)

    for n in tl.range(first, tl.minimum(first + rows_per_program, N), num_stages=STAGES):
        start = (b * N + n) * D
        head_dout = tl.load(dout_ptr + start + head).to(tl.float32)
        head_dbias += head_gate * head_dout
        tl.store(dy_ptr + start + head, head_gate * head_dout)
        if y_ptr is not None:
            head_dgate += head_dout * tl.load(y_ptr + start + head).to(tl.float32)
        if TAIL > 0:
            tail_dout = tl.load(dout_ptr + start + tail, mask=in_row, other=0.0).to(tl.float32)
            tail_dbias += tail_gate * tail_dout
            tl.store(dy_ptr + start + tail, tail_gate * tail_dout, mask=in_row)
            if y_ptr is not None:
                tail_y = tl.load(y_ptr + start + tail, mask=in_row, other=0.0).to(tl.float32)
                tail_dgate += tail_dout * tail_y

    dbias_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * D
    tl.store(dbias_ptr + head, head_dbias)
    if TAIL > 0:
        tl.store(dbias_ptr + tail, tail_dbias, mask=in_row)
    if y_ptr is not None:
        dgate_ptr = dbias_ptr + tl.num_programs(0).to(tl.int64) * D
        tl.store(dgate_ptr + head, head_dgate)
        if TAIL > 0:
            tl.store(dgate_ptr + tail, tail_dgate, mask=in_row)


@operation("longtake::gated_residual_forward")
def _forward(x_BND: Tensor, gate_BD: Tensor | None, y_BND: Tensor) -> Tensor:
    require_kernel_dtype(x=x_BND, gate=gate_BD, y=y_BND)
    x_BND, y_BND = x_BND.contiguous(), y_BND.contiguous()
    gate_BD = None if gate_BD is None else contiguous_rows(gate_BD)
    B, N, D = x_BND.shape
    out_BND = torch.empty_like(x_BND)
    head, tail = split_row(D)
    num_warps = warps_per_row(head)
    rows, chunks = deal_rows(N, B, multiple=LEAST_ROWS, programs=FORWARD_PROGRAMS)
    launch(
        _gated_residual_forward_kernel,
        (B * chunks,),
        x_BND,
        gate_BD,
        y_BND,
        out_BND,
        N,
        0 if gate_BD is None else gate_BD.stride(0),
        rows,
        chunks,
        D=D,
        HEAD=head,
        TAIL=tail,
        num_warps=num_warps,
    )
    return out_BND


@register_fake(_forward)
def _(x_BND: Tensor, gate_BD: Tensor | None, y_BND: Tensor) -> Tensor:
    return x_BND.new_empty(x_BND.shape)


@operation("longtake::gated_residual_backward")
def _backward(dout_BND: Tensor, gate_BD: Tensor, y_BND: Tensor | None) -> tuple[Tensor, Tensor]:
    require_kernel_dtype(dout=dout_BND, gate=gate_BD, y=y_BND)
    dout_BND, gate_BD = dout_BND.contiguous(), contiguous_rows(gate_BD)
    y_BND = None if y_BND is None else y_BND.contiguous()
    B, N, D = dout_BND.shape
    dy_BND = torch.empty_like(dout_BND if y_BND is None else y_BND)
    head, tail = split_row(D)
    num_warps = warps_per_row(head)
    rows, chunks = deal_rows(N, B, multiple=LEAST_ROWS, programs=BACKWARD_PROGRAMS)
    num_sums = 1 if y_BND is None else 2
    partials_2BPD = dout_BND.new_empty(num_sums, B, chunks, D, dtype=torch.float32)
    launch(
        _gated_residual_backward_kernel,
        (B * chunks,),
        dout_BND,
        gate_BD,
        y_BND,
        dy_BND,
        partials_2BPD,
        N,
        gate_BD.stride(0),
        rows,
        chunks,
        D=D,
        HEAD=head,
        TAIL=tail,
        STAGES=STAGES,
        num_warps=num_warps,
    )
    if y_BND is None:
        return dy_BND, sum_partials(partials_2BPD.flatten(1, 2))
    return dy_BND, sum_partials_of_all_and_each(partials_2BPD)


@register_fake(_backward)
def _(dout_BND: Tensor, gate_BD: Tensor, y_BND: Tensor | None) -> tuple[Tensor, Tensor]:
    dy_BND = (dout_BND if y_BND is None else y_BND).new_empty(dout_BND.shape)
    num_sums = 1 if y_BND is None else 1 + gate_BD.shape[0]
    return dy_BND, gate_BD.new_empty(num_sums, gate_BD.shape[1], dtype=torch.float32)


def gated_residual_forward(x_BND: Tensor, gate_BD: Tensor | None, y_BND: Tensor) -> Tensor:
    """x + gate * y in the dtype of x, or x + y without a gate, with one rounding.

    Not differentiable. Tokens that are not contiguous are copied; rows of the gate may lie apart.
    """
    return _forward(x_BND, gate_BD, y_BND)


def gated_residual_backward(
    dout_BND: Tensor, gate_BD: Tensor | None, y_BND: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dy = gate * dout, dgate (float32 (B, D)), dbias (float32 (D,)): the sum over all rows of dy.

    dbias is the gradient of the bias of the linear layer that made y. It and dgate come with the
    one pass that reads dout and y and writes dy. dy has the dtype of y. Without y, dgate is an
    empty tensor; without a gate it is, too, and dy is dout itself. Tokens that are not contiguous
    are copied.
    """
    if gate_BD is None:
        dgate_BD = dout_BND.new_empty(0, dtype=torch.float32)
        return dout_BND, dgate_BD, column_sum(dout_BND.flatten(0, -2))
    dy_BND, sums_GD = _backward(dout_BND, gate_BD, y_BND)
    return dy_BND, sums_GD[1:], sums_GD[0]


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BND: Tensor, gate_BD: Tensor, y_BND: Tensor) -> Tensor:
        ctx.save_for_backward(gate_BD, y_BND)
        return gated_residual_forward(x_BND, gate_BD, y_BND)

    @staticmethod
    def backward(ctx, dout_BND: Tensor):
        gate_BD, y_BND = ctx.saved_tensors
        dy_BND, dgate_BD, _ = gated_residual_backward(dout_BND, gate_BD, y_BND)
        return dout_BND, dgate_BD.to(gate_BD.dtype), dy_BND


def gated_residual(x_BND: Tensor, gate_B1D: Tensor, y_BND: Tensor) -> Tensor:
    """x + gate * y, with the shape and dtype of x; also x_BTSD with gate_B11D.

    Raises:
        ValueError: in the kernels, the gate is not one row per sample, or something is float64
            although Triton was asked for by name.
    """
    if not picks_triton(x_BND):
        return gated_residual_reference(x_BND, gate_B1D, y_BND)
    gate_BD = row_per_sample(gate_B1D, x_BND)
    return _GatedResidual.apply(as_BND(x_BND), gate_BD, as_BND(y_BND)).view_as(x_BND)
