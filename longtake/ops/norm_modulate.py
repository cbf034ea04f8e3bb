# What triton.jit makes of a kernel is no function to a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportOperatorIssue=false
"""Layer normalization followed by the shift and scale of adaptive conditioning.

Letters: B batch, N tokens, D hidden size, P programs that share a sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.ops.column_sum import sum_partials
from longtake.ops.elementwise import (
    LEAST_ROWS,
    as_BND,
    contiguous_rows,
    deal_rows,
    picks_triton,
    require_kernel_dtype,
    split_row,
    sum_row,
    warps_per_row,
)
from longtake.ops.launch import launch
from longtake.ops.operation import operation, register_fake
from longtake.ops.row_per_sample import row_per_sample
from longtake.ops.triton_language import tl, triton

# About two rounds of what the 132 multiprocessors of an H200 hold at once; few enough that what a
# program reads (shift, scale) and writes (partial sums) beside its rows is little. STAGES: two rows
# are on their way to shared memory while threads work on a third.
FORWARD_PROGRAMS = 4096
BACKWARD_PROGRAMS = 1536
STAGES = 3


def norm_modulate_reference(
    x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float = 1e-6
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in plain torch."""
    h_BND = F.layer_norm(x_BND, x_BND.shape[-1:], eps=eps) * (1 + scale_B1D) + shift_B1D
    return h_BND.to(x_BND.dtype)


@triton.jit
def _norm_modulate_forward_kernel(
    x_ptr,  # (B, N, D)
    shift_ptr,  # (B, D), rows shift_stride apart
    scale_ptr,  # (B, D), rows scale_stride apart
    h_ptr,  # (B, N, D)
    mean_ptr,  # (B, N) fp32
    rstd_ptr,  # (B, N) fp32
    N,
    shift_stride,
    scale_stride,
    rows_per_program,
    programs_per_sample,
    eps,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
):
    b = (tl.program_id(0) // programs_per_sample).to(tl.int64)
    first = tl.program_id(0) % programs_per_sample * rows_per_program
    shift_ptr += b * shift_stride
    scale_ptr += b * scale_stride
    head = tl.arange(0, HEAD)
    head_shift = tl.load(shift_ptr + head).to(tl.float32)
    head_factor = 1 + tl.load(scale_ptr + head).to(tl.float32)
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)
        in_row = tail < D
        tail_shift = tl.load(shift_ptr + tail, mask=in_row, other=0.0).to(tl.float32)
        tail_factor = 1 + tl.load(scale_ptr + tail, mask=in_row, other=0.0).to(tl.float32)

    for n in tl.range(first, tl.minimum(first + rows_per_program, N), num_stages=STAGES):
        row = b * N + n
        head_x = tl.load(x_ptr + row * D + head).to(tl.float32)
        # Two passes over registers: the mean of squares less the squared mean would cancel.
        if TAIL > 0:
            tail_x = tl.load(x_ptr + row * D + tail, mask=in_row, other=0.0).to(tl.float32)
            mean = sum_row(head_x, tail_x, HEAD, TAIL) / D
            head_x -= mean
            tail_x = tl.where(in_row, tail_x - mean, 0.0)
            variance = sum_row(head_x * head_x, tail_x * tail_x, HEAD, TAIL) / D
        else:
            mean = tl.sum(head_x, axis=0) / D
            head_x -= mean
            variance = tl.sum(head_x * head_x, axis=0) / D
        rstd = 1 / tl.sqrt(variance + eps)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
        tl.store(h_ptr + row * D + head, head_x * rstd * head_factor + head_shift)
        if TAIL > 0:
            tail_h = tail_x * rstd * tail_factor + tail_shift
            tl.store(h_ptr + row * D + tail, tail_h, mask=in_row)


# dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + carried, with g = dh * (1 + scale)
@triton.jit
def _norm_modulate_backward_kernel(
    dh_ptr,  # (B, N, D)
    x_ptr,  # (B, N, D)
    mean_ptr,  # (B, N) fp32
    rstd_ptr,  # (B, N) fp32
    shift_ptr,  # (B, D), rows shift_stride apart
    scale_ptr,  # (B, D), rows scale_stride apart
    carried_ptr,  # (B, N, D) or None
    dx_ptr,  # (B, N, D)
    h_ptr,  # (B, N, D) or None
    partials_ptr,  # (2, B, P, D) fp32: of dshift, of dscale
    N,
    shift_stride,
    scale_stride,
    rows_per_program,
    programs_per_sample,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
):
    b = (tl.program_id(0) // programs_per_sample).to(tl.int64)
    first = tl.program_id(0) % programs_per_sample * rows_per_program
    shift_ptr += b * shift_stride
    scale_ptr += b * scale_stride
    head = tl.arange(0, HEAD)
    head_factor = 1 + tl.load(scale_ptr + head).to(tl.float32)
    head_dshift = tl.zeros((HEAD,), tl.float32)
    head_dscale = tl.zeros((HEAD,), tl.float32)
    if h_ptr is not None:
        head_shift = tl.load(shift_ptr + head).to(tl.float32)
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)
        in_row = tail < D
        tail_factor = 1 + tl.load(scale_ptr + tail, mask=in_row, other=0.0).to(tl.float32)
        tail_dshift = tl.zeros((TAIL,), tl.float32)
        tail_dscale = tl.zeros((TAIL,), tl.float32)
        if h_ptr is not None:
            tail_shift = tl.load(shift_ptr + tail, mask=in_row, other=0.0).to(tl.float32)

    for n in tl.range(first, tl.minimum(first + rows_per_program, N), num_stages=STAGES):
        row = b * N + n
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        head_dh = tl.load(dh_ptr + row * D + head).to(tl.float32)
        head_xhat = (tl.load(x_ptr + row * D + head).to(tl.float32) - mean) * rstd
        head_g = head_dh * head_factor
        head_dshift += head_dh
        head_dscale += head_dh * head_xhat
        if TAIL > 0:
            # Beyond the row xhat is not zero; but dh is, a factor of all that is summed.
            tail_dh = tl.load(dh_ptr + row * D + tail, mask=in_row, other=0.0).to(tl.float32)
            tail_x = tl.load(x_ptr + row * D + tail, mask=in_row, other=0.0).to(tl.float32)
            tail_xhat = (tail_x - mean) * rstd
            tail_g = tail_dh * tail_factor
            tail_dshift += tail_dh
            tail_dscale += tail_dh * tail_xhat
            mean_g = sum_row(head_g, tail_g, HEAD, TAIL) / D
            mean_g_xhat = sum_row(head_g * head_xhat, tail_g * tail_xhat, HEAD, TAIL) / D
        else:
            mean_g = tl.sum(head_g, axis=0) / D
            mean_g_xhat = tl.sum(head_g * head_xhat, axis=0) / D

        head_dx = (head_g - mean_g - head_xhat * mean_g_xhat) * rstd
        if carried_ptr is not None:
            head_dx += tl.load(carried_ptr + row * D + head).to(tl.float32)
        tl.store(dx_ptr + row * D + head, head_dx)
        if h_ptr is not None:
            tl.store(h_ptr + row * D + head, head_xhat * head_factor + head_shift)
        if TAIL > 0:
            tail_dx = (tail_g - mean_g - tail_xhat * mean_g_xhat) * rstd
            if carried_ptr is not None:
                carried_ptrs = carried_ptr + row * D + tail
                tail_dx += tl.load(carried_ptrs, mask=in_row, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * D + tail, tail_dx, mask=in_row)
            if h_ptr is not None:
                tail_h = tail_xhat * tail_factor + tail_shift
                tl.store(h_ptr + row * D + tail, tail_h, mask=in_row)

    dshift_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * D
    dscale_ptr = dshift_ptr + tl.num_programs(0).to(tl.int64) * D
    tl.store(dshift_ptr + head, head_dshift)
    tl.store(dscale_ptr + head, head_dscale)
    if TAIL > 0:
        tl.store(dshift_ptr + tail, tail_dshift, mask=in_row)
        tl.store(dscale_ptr + tail, tail_dscale, mask=in_row)


@operation("longtake::norm_modulate_forward")
def _forward(
    x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    require_kernel_dtype(x=x_BND, shift=shift_BD, scale=scale_BD)
    x_BND = x_BND.contiguous()
    shift_BD, scale_BD = contiguous_rows(shift_BD), contiguous_rows(scale_BD)
    B, N, D = x_BND.shape
    h_BND = torch.empty_like(x_BND)
    mean_BN = x_BND.new_empty(B, N, dtype=torch.float32)
    rstd_BN = torch.empty_like(mean_BN)
    head, tail = split_row(D)
    num_warps = warps_per_row(head)
    rows, chunks = deal_rows(N, B, multiple=LEAST_ROWS, programs=FORWARD_PROGRAMS)
    launch(
        _norm_modulate_forward_kernel,
        (B * chunks,),
        x_BND,
        shift_BD,
        scale_BD,
        h_BND,
        mean_BN,
        rstd_BN,
        N,
        shift_BD.stride(0),
        scale_BD.stride(0),
        rows,
        chunks,
        eps,
        D=D,
        HEAD=head,
        TAIL=tail,
        STAGES=STAGES,
        num_warps=num_warps,
    )
    return h_BND, mean_BN, rstd_BN


@register_fake(_forward)
def _(
    x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean_BN = x_BND.new_empty(x_BND.shape[:2], dtype=torch.float32)
    return x_BND.new_empty(x_BND.shape), mean_BN, torch.empty_like(mean_BN)


@operation("longtake::norm_modulate_backward")
def _backward(
    dh_BND: Tensor,
    x_BND: Tensor,
    mean_BN: Tensor,
    rstd_BN: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    carried_BND: Tensor | None,
    with_output: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    require_kernel_dtype(dh=dh_BND, x=x_BND, shift=shift_BD, scale=scale_BD, carried=carried_BND)
    dh_BND, x_BND = dh_BND.contiguous(), x_BND.contiguous()
    mean_BN, rstd_BN = mean_BN.contiguous(), rstd_BN.contiguous()
    carried_BND = None if carried_BND is None else carried_BND.contiguous()
    shift_BD, scale_BD = contiguous_rows(shift_BD), contiguous_rows(scale_BD)
    B, N, D = x_BND.shape
    dx_BND = torch.empty_like(x_BND)
    h_BND = torch.empty_like(x_BND) if with_output else None
    head, tail = split_row(D)
    num_warps = warps_per_row(head)
    rows, chunks = deal_rows(N, B, multiple=LEAST_ROWS, programs=BACKWARD_PROGRAMS)
    partials_2BPD = x_BND.new_empty(2, B, chunks, D, dtype=torch.float32)
    launch(
        _norm_modulate_backward_kernel,
        (B * chunks,),
        dh_BND,
        x_BND,
        mean_BN,
        rstd_BN,
        shift_BD,
        scale_BD,
        carried_BND,
        dx_BND,
        h_BND,
        partials_2BPD,
        N,
        shift_BD.stride(0),
        scale_BD.stride(0),
        rows,
        chunks,
        D=D,
        HEAD=head,
        TAIL=tail,
        STAGES=STAGES,
        num_warps=num_warps,
    )
    sums_2BD = sum_partials(partials_2BPD.flatten(0, 1)).view(2, B, D)
    return dx_BND, sums_2BD, x_BND.new_empty(0) if h_BND is None else h_BND


@register_fake(_backward)
def _(
    dh_BND: Tensor,
    x_BND: Tensor,
    mean_BN: Tensor,
    rstd_BN: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    carried_BND: Tensor | None,
    with_output: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sums_2BD = x_BND.new_empty(2, *scale_BD.shape, dtype=torch.float32)
    h_BND = x_BND.new_empty(x_BND.shape if with_output else 0)
    return x_BND.new_empty(x_BND.shape), sums_2BD, h_BND


def norm_modulate_forward(
    x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h = LayerNorm(x) * (1 + scale) + shift, and mean and 1/deviation, float32 (B, N).

    One read of x, one write of h in its dtype, with one rounding. Not differentiable. An x that is
    not contiguous is copied; rows of shift and scale may lie apart.
    """
    return _forward(x_BND, shift_BD, scale_BD, eps)


def norm_modulate_backward(
    dh_BND: Tensor,
    x_BND: Tensor,
    mean_BN: Tensor,
    rstd_BN: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    carried_BND: Tensor | None,
    with_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dshift and dscale (float32 (B, D)), and h again if with_output, else an empty tensor.

    carried is the gradient that reaches x by its other way, the residual stream: it is added before
    the one rounding. Reads dh, x and carried, writes dx and h, once each. Tokens that are not
    contiguous are copied.
    """
    dx_BND, sums_2BD, h_BND = _backward(
        dh_BND, x_BND, mean_BN, rstd_BN, shift_BD, scale_BD, carried_BND, with_output
    )
    dshift_BD, dscale_BD = sums_2BD.unbind()
    return dx_BND, dshift_BD, dscale_BD, h_BND


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
        h_BND, mean_BN, rstd_BN = norm_modulate_forward(x_BND, shift_BD, scale_BD, eps)
        ctx.save_for_backward(x_BND, mean_BN, rstd_BN, shift_BD, scale_BD)
        return h_BND

    @staticmethod
    def backward(ctx, dh_BND: Tensor):
        x_BND, mean_BN, rstd_BN, shift_BD, scale_BD = ctx.saved_tensors
        dx_BND, dshift_BD, dscale_BD, _ = norm_modulate_backward(
            dh_BND, x_BND, mean_BN, rstd_BN, shift_BD, scale_BD, None, False
        )
        return dx_BND, dshift_BD.to(shift_BD.dtype), dscale_BD.to(scale_BD.dtype), None


def norm_modulate(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, with the shape and dtype of x.

    The norm has no weights of its own and its statistics are float32 for half-precision x. Tokens
    may have any number of dimensions (x_BTSD with shift_B11D).

    Source: Peebles and Xie, "Scalable diffusion models with transformers", arXiv:2212.09748.

    Raises:
        ValueError: in the kernels, shift or scale is not one row per sample, or something is
            float64 although Triton was asked for by name.
    """
    if not picks_triton(x_BND):
        return norm_modulate_reference(x_BND, shift_B1D, scale_B1D, eps)
    shift_BD, scale_BD = row_per_sample(shift_B1D, x_BND), row_per_sample(scale_B1D, x_BND)
    return _NormModulate.apply(as_BND(x_BND), shift_BD, scale_BD, eps).view_as(x_BND)
