# pyright: basic, reportArgumentType=false, reportCallIssue=false
# A launch takes what the kernel's own signature does not say.
"""The update of all weights in one pass over memory: clipping, AdamW, and the weights' average.

Per weight 20 bytes are read and 16 written, 18 with a copy in half precision; as operations of
their own, clipping, AdamW and the average move 48 or more. These are no custom operators: they
change tensors in place, found by address, and belong outside of compiled graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longtake.ops import adamw_ema_kernel as kernels
from longtake.ops.launch import launch
from longtake.ops.tensor_table import CHUNK, TensorTable
from longtake.ops.triton_language import tl, triton

Tensors = Sequence[Tensor]


@torch.no_grad()
def adamw_ema_reference(
    params: Tensors,
    gradients: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    averages: Tensors,
    steps: Tensors,
    *,
    clip_factor: Tensor,
    applied: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_rate: float,
    copies: Tensors | None = None,
) -> None:
    """What `adamw_ema` does, in plain torch, in the dtype of the parameters."""
    beta1, beta2 = betas
    is_applied = applied != 0
    for p, gradient, m, v, a, step in zip(
        params, gradients, exp_avgs, exp_avg_sqs, averages, steps, strict=True
    ):
        step += applied
        g = gradient.to(p.dtype) * clip_factor
        m_new = m + (1 - beta1) * (g - m)
        v_new = v + (1 - beta2) * (g * g - v)
        correction1 = (1 - beta1 ** step.double()).to(p.dtype)
        correction2 = (1 - beta2 ** step.double()).sqrt().to(p.dtype)
        p_new = p - lr * weight_decay * p
        p_new = p_new - lr / correction1 * m_new / (v_new.sqrt() / correction2 + eps)
        a_new = a + ema_rate * (p_new - a)
        for old, new in ((p, p_new), (m, m_new), (v, v_new), (a, a_new)):
            old.copy_(torch.where(is_applied, new, old))
    if copies is not None:
        for copy, p in zip(copies, params, strict=True):
            copy.copy_(torch.where(is_applied, p.to(copy.dtype), copy))


@torch.no_grad()
def squared_norm_reference(tensors: Tensors) -> Tensor:
    """What `squared_norm` does, in plain torch."""
    sums = [tensor.float().square().sum() for tensor in tensors]
    return torch.stack(sums).sum()


@torch.no_grad()
def squared_norm(tensors: Tensors, table: TensorTable | None = None) -> Tensor:
    """The sum of the squares of all elements, fp32 (); not finite exactly if an element is not, or
    if a square overflows.

    The tensors have one dtype and are contiguous. Always added in the same order. `table` spares
    the host work where it is called step after step.
    """
    _check(tensors, dtype=tensors[0].dtype, device=tensors[0].device)
    table = table or TensorTable()
    table.write(tensors)
    device = tensors[0].device
    total = torch.zeros((), dtype=torch.float32, device=device)
    if not table.num_chunks:
        return total
    sums_C = torch.empty(table.num_chunks, dtype=torch.float32, device=device)
    launch(
        kernels.sum_of_squares_kernel,
        (table.num_chunks,),
        table.addresses_RP,
        table.sizes_P,
        table.chunks_2C,
        sums_C,
        DTYPE=_triton_dtype(tensors[0].dtype),
        CHUNK=CHUNK,
        BLOCK=kernels.NORM_BLOCK,
        num_warps=kernels.NUM_WARPS,
    )
    launch(
        kernels.sum_kernel,
        (1,),
        sums_C,
        table.num_chunks,
        total,
        BLOCK_C=kernels.SUM_BLOCK,
        num_warps=8,
    )
    return total


@torch.no_grad()
def adamw_ema(
    params: Tensors,
    gradients: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    averages: Tensors,
    steps: Tensors,
    *,
    clip_factor: Tensor,
    applied: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_rate: float,
    copies: Tensors | None = None,
    table: TensorTable | None = None,
) -> None:
    """One step of AdamW on clip_factor * gradients, as `torch.optim.AdamW` takes it; then
    average += ema_rate * (param - average). In place, all tensors in one launch.

    All are fp32 and contiguous, but gradients may have another dtype, the same for all; so may
    `copies`, which become the parameters, rounded. `steps` () count the updates of each tensor.
    `clip_factor` and `applied` () are fp32 on the device: where `applied` is 0.0 every tensor keeps
    every bit. `table` spares the host work where this is called step after step.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101.
    """
    lists = (
        params,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        averages,
        *([copies] if copies else []),
        steps,
    )
    for tensors in lists:
        assert len(tensors) == len(params)
        has_own_dtype = tensors is gradients or tensors is copies
        dtype = tensors[0].dtype if has_own_dtype else torch.float32
        _check(tensors, dtype=dtype, device=params[0].device)
    for tensors in lists[:-1]:
        sizes_match = all(t.shape == p.shape for t, p in zip(tensors, params, strict=True))
        assert sizes_match, "all but steps have the shapes of their parameters"
    assert clip_factor.dtype == applied.dtype == torch.float32
    table = table or TensorTable()
    table.write(*lists)
    device, num_tensors = params[0].device, len(params)
    corrections_2P = torch.empty(2, num_tensors, dtype=torch.float32, device=device)
    launch(
        kernels.begin_update_kernel,
        (triton.cdiv(num_tensors, kernels.STEP_BLOCK),),
        table.addresses_RP[-1],
        num_tensors,
        applied,
        corrections_2P,
        _log(betas[0]),
        _log(betas[1]),
        BLOCK_P=kernels.STEP_BLOCK,
        num_warps=4,
    )
    if not table.num_chunks:
        return
    # lr and ema_rate change from step to step: as numbers of the launch, not of the code.
    launch(
        kernels.adamw_ema_kernel,
        (table.num_chunks,),
        table.addresses_RP,
        table.sizes_P,
        table.chunks_2C,
        corrections_2P,
        clip_factor,
        applied,
        num_tensors,
        float(lr),
        float(1 - betas[0]),
        float(1 - betas[1]),
        float(eps),
        float(lr * weight_decay),
        float(ema_rate),
        GRADIENT=_triton_dtype(gradients[0].dtype),
        COPY=_triton_dtype(copies[0].dtype) if copies else None,
        CHUNK=CHUNK,
        BLOCK=kernels.BLOCK,
        num_warps=kernels.NUM_WARPS,
    )


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _check(tensors: Tensors, *, dtype: torch.dtype, device: torch.device) -> None:
    for tensor in tensors:
        assert tensor.dtype == dtype, f"{tensor.dtype} in a list of {dtype}"
        # The kernels only see an address: of another device's memory, it would kill the process.
        assert tensor.device == device, f"a tensor on {tensor.device} in a list for {device}"
        assert tensor.is_contiguous(), f"strides {tensor.stride()} in a list for one launch"


def _triton_dtype(dtype: torch.dtype) -> object:
    return {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }[dtype]
