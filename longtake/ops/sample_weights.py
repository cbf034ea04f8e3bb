# What triton.jit makes of a kernel is no function to a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""From gradients of weights that each sample had for itself, gate times weight, to those of gate,
weight and bias.

Letters: B batch, D outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.ops.elementwise import contiguous_rows, require_kernel_dtype, split_row, warps_per_row
from longtake.ops.launch import launch
from longtake.ops.operation import operation, register_fake
from longtake.ops.triton_language import tl, triton

# Samples on their way while one is added: a program has a row of each, and little else to do.
STAGES = 3


def merge_sample_gradients_reference(
    dsample_BDI: Tensor, sums_BD: Tensor, gate_BD: Tensor, weight_DI: Tensor, bias_D: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of gate (B, D), weight (D, I) and bias (D,), in plain torch; the last at least float32.

    dsample_BDI are the gradients of gate * weight, sums_BD of gate * bias.
    """
    wide = torch.promote_types(weight_DI.dtype, torch.float32)
    dsample_BDI, gate_BD1 = dsample_BDI.to(wide), gate_BD[:, :, None].to(wide)
    sums_BD = sums_BD.to(wide)
    dgate_BD = (dsample_BDI * weight_DI).sum(-1) + sums_BD * bias_D
    dweight_DI, dbias_D = (gate_BD1 * dsample_BDI).sum(0), (gate_BD1[..., 0] * sums_BD).sum(0)
    return dgate_BD.to(gate_BD.dtype), dweight_DI.to(weight_DI.dtype), dbias_D


@triton.jit
def _merge_kernel(
    dsample_ptr,  # (B, D, I)
    sums_ptr,  # (B, D) fp32
    gate_ptr,  # (B, D), rows gate_stride apart
    weight_ptr,  # (D, I)
    bias_ptr,  # (D,)
    dgate_ptr,  # (B, D)
    dweight_ptr,  # (D, I)
    dbias_ptr,  # (D,) fp32
    B,
    D,
    gate_stride,
    I: tl.constexpr,  # noqa: E741
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
):
    # A program has one output of the layer: a row of its weight.
    d = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL if TAIL > 0 else 1)
    in_row = tail < I
    weight_head = tl.load(weight_ptr + d * I + head).to(tl.float32)
    dweight_head = tl.zeros((HEAD,), tl.float32)
    if TAIL > 0:
        weight_tail = tl.load(weight_ptr + d * I + tail, mask=in_row, other=0.0).to(tl.float32)
        dweight_tail = tl.zeros((TAIL,), tl.float32)
    bias = tl.load(bias_ptr + d).to(tl.float32)
    dbias = bias * 0.0
    for b in tl.range(0, B, num_stages=STAGES):
        row = dsample_ptr + (b * D + d) * I
        gate = tl.load(gate_ptr + b * gate_stride + d).to(tl.float32)
        sums = tl.load(sums_ptr + b * D + d)
        rows_head = tl.load(row + head).to(tl.float32)
        dgate = tl.sum(rows_head * weight_head, axis=0) + sums * bias
        dweight_head += gate * rows_head
        if TAIL > 0:
            rows_tail = tl.load(row + tail, mask=in_row, other=0.0).to(tl.float32)
            dgate += tl.sum(rows_tail * weight_tail, axis=0)
            dweight_tail += gate * rows_tail
        dbias += gate * sums
        tl.store(dgate_ptr + b * D + d, dgate.to(dgate_ptr.dtype.element_ty))
    element = dweight_ptr.dtype.element_ty
    tl.store(dweight_ptr + d * I + head, dweight_head.to(element))
    if TAIL > 0:
        tl.store(dweight_ptr + d * I + tail, dweight_tail.to(element), mask=in_row)
    tl.store(dbias_ptr + d, dbias)


@operation("longtake::merge_sample_gradients")
def _merge(
    dsample_BDI: Tensor, sums_BD: Tensor, gate_BD: Tensor, weight_DI: Tensor, bias_D: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    require_kernel_dtype(dsample=dsample_BDI, gate=gate_BD, weight=weight_DI, bias=bias_D)
    B, D, I = dsample_BDI.shape  # noqa: E741
    gate_BD = contiguous_rows(gate_BD)
    dgate_BD = gate_BD.new_empty(B, D)
    dweight_DI = weight_DI.new_empty(D, I)
    dbias_D = bias_D.new_empty(D, dtype=torch.float32)
    head, tail = split_row(I)
    launch(
        _merge_kernel,
        (D,),
        dsample_BDI.contiguous(),
        sums_BD.float().contiguous(),
        gate_BD,
        weight_DI.contiguous(),
        bias_D.contiguous(),
        dgate_BD,
        dweight_DI,
        dbias_D,
        B,
        D,
        gate_BD.stride(0),
        I=I,
        HEAD=head,
        TAIL=tail,
        STAGES=STAGES,
        num_warps=warps_per_row(head),
    )
    return dgate_BD, dweight_DI, dbias_D


@register_fake(_merge)
def _(
    dsample_BDI: Tensor, sums_BD: Tensor, gate_BD: Tensor, weight_DI: Tensor, bias_D: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dbias_D = bias_D.new_empty(bias_D.shape, dtype=torch.float32)
    return gate_BD.new_empty(gate_BD.shape), weight_DI.new_empty(weight_DI.shape), dbias_D


def merge_sample_gradients(
    dsample_BDI: Tensor, sums_BD: Tensor, gate_BD: Tensor, weight_DI: Tensor, bias_D: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate (B, D) and weight (D, I) in their dtypes and of bias (D,) in float32,
    from those of gate * weight (B, D, I) and of gate * bias (B, D). Not differentiable.

    Reads the first once; sums are float32. What is not contiguous is copied, but for the gate's
    rows, which may lie apart.
    """
    return _merge(dsample_BDI, sums_BD, gate_BD, weight_DI, bias_D)
