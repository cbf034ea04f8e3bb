# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false
# Triton's constants are values inside a kernel, but typed as the class that wraps them.
"""Kernels over lists of tensors: AdamW with an average of the weights, and a sum of squares."""

from __future__ import annotations

from longtake.ops.triton_language import tl, triton

# Elements in flight per program: two loads of 16 bytes per thread and tensor.
BLOCK = 1024
NORM_BLOCK = 2048
NUM_WARPS = 4
# Of the kernels that one program or few run.
SUM_BLOCK = 4096
STEP_BLOCK = 128


@triton.jit
def begin_update_kernel(
    addresses_P,  # int64, (P,): steps
    num_tensors,
    applied,  # fp32, ()
    corrections_2P,  # fp32, (2, P)
    log_beta1,
    log_beta2,
    BLOCK_P: tl.constexpr,
):
    """Counts this update in every tensor's step, and what the count makes of the moments."""
    place = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = place < num_tensors
    address = tl.load(addresses_P + place, mask=mask, other=0)
    step_ptr = address.to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=mask, other=1.0) + tl.load(applied)
    tl.store(step_ptr, step, mask=mask)
    # 1 - beta ** step, in float64: with beta near 1 the difference has few digits left in float32.
    step = step.to(tl.float64)
    correction1 = 1 - tl.exp(step * log_beta1)
    correction2 = 1 - tl.exp(step * log_beta2)
    # A first update that is skipped has step 0 and infinite corrections, which nobody reads.
    tl.store(corrections_2P + place, (1 / correction1).to(tl.float32), mask=mask)
    out = corrections_2P + num_tensors + place
    tl.store(out, (1 / tl.sqrt(correction2)).to(tl.float32), mask=mask)


@triton.jit
def adamw_ema_kernel(
    addresses_RP,  # int64, (R, P): parameters, gradients, both moments, averages, perhaps copies
    sizes_P,  # int64, (P,)
    chunks_2C,  # int32, (2, C)
    corrections_2P,  # fp32, (2, P)
    clip_factor,  # fp32, ()
    applied,  # fp32, ()
    num_tensors,
    lr,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    shrink,  # lr * weight_decay
    ema_rate,
    GRADIENT: tl.constexpr,  # dtype of the gradients
    COPY: tl.constexpr,  # and of the parameters' copies, or None
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    tensor = tl.load(chunks_2C + chunk)
    start = tl.load(chunks_2C + tl.num_programs(0) + chunk).to(tl.int64) * CHUNK
    size = tl.load(sizes_P + tensor)
    row = addresses_RP + tensor
    param = tl.load(row) + start * 4
    gradient = tl.load(row + num_tensors) + start * (GRADIENT.primitive_bitwidth // 8)
    exp_avg = tl.load(row + 2 * num_tensors) + start * 4
    exp_avg_sq = tl.load(row + 3 * num_tensors) + start * 4
    average = tl.load(row + 4 * num_tensors) + start * 4
    copy = param  # for nobody
    if COPY is not None:
        copy = tl.load(row + 5 * num_tensors) + start * (COPY.primitive_bitwidth // 8)
    correction1 = tl.load(corrections_2P + tensor)
    correction2 = tl.load(corrections_2P + num_tensors + tensor)
    factor = tl.load(clip_factor)
    # A skipped update has nothing to do, and so keeps every bit.
    count = tl.where(tl.load(applied) == 0, 0, tl.minimum(size - start, CHUNK)).to(tl.int32)
    step_size = lr * correction1

    all_addresses = param | gradient | exp_avg | exp_avg_sq | average | copy
    if ((all_addresses % 16) == 0) & (count % 4 == 0):
        _update_chunk(
            param, gradient, exp_avg, exp_avg_sq, average, copy, count // 4 * 4, factor, step_size,
            correction2, one_minus_beta1, one_minus_beta2, eps, shrink, ema_rate,
            GRADIENT, COPY, BLOCK, IS_ALIGNED=True,
        )  # fmt: skip
    else:
        _update_chunk(
            param, gradient, exp_avg, exp_avg_sq, average, copy, count, factor, step_size,
            correction2, one_minus_beta1, one_minus_beta2, eps, shrink, ema_rate,
            GRADIENT, COPY, BLOCK, IS_ALIGNED=False,
        )  # fmt: skip


@triton.jit
def _update_chunk(
    param,
    gradient,
    exp_avg,
    exp_avg_sq,
    average,
    copy,
    count,
    factor,
    step_size,
    correction2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    shrink,
    ema_rate,
    GRADIENT: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):
    param_ptr = _pointer(param, tl.float32, IS_ALIGNED)
    gradient_ptr = _pointer(gradient, GRADIENT, IS_ALIGNED)
    exp_avg_ptr = _pointer(exp_avg, tl.float32, IS_ALIGNED)
    exp_avg_sq_ptr = _pointer(exp_avg_sq, tl.float32, IS_ALIGNED)
    average_ptr = _pointer(average, tl.float32, IS_ALIGNED)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        mask = place < count
        g = tl.load(gradient_ptr + place, mask=mask, other=0.0).to(tl.float32) * factor
        p = tl.load(param_ptr + place, mask=mask, other=0.0)
        m = tl.load(exp_avg_ptr + place, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq_ptr + place, mask=mask, other=0.0)
        a = tl.load(average_ptr + place, mask=mask, other=0.0)
        p -= shrink * p
        # As steps towards the gradient: 1 - beta has more digits in float32 than beta.
        m += one_minus_beta1 * (g - m)
        v += one_minus_beta2 * (g * g - v)
        p -= tl.div_rn(step_size * m, tl.sqrt_rn(v) * correction2 + eps)
        a += ema_rate * (p - a)
        tl.store(param_ptr + place, p, mask=mask)
        tl.store(exp_avg_ptr + place, m, mask=mask)
        tl.store(exp_avg_sq_ptr + place, v, mask=mask)
        tl.store(average_ptr + place, a, mask=mask)
        if COPY is not None:
            tl.store(_pointer(copy, COPY, IS_ALIGNED) + place, p.to(COPY), mask=mask)


@triton.jit
def sum_of_squares_kernel(
    addresses_P,  # int64, (P,)
    sizes_P,  # int64, (P,)
    chunks_2C,  # int32, (2, C)
    sums_C,  # fp32, (C,)
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    tensor = tl.load(chunks_2C + chunk)
    start = tl.load(chunks_2C + tl.num_programs(0) + chunk).to(tl.int64) * CHUNK
    address = tl.load(addresses_P + tensor) + start * (DTYPE.primitive_bitwidth // 8)
    count = tl.minimum(tl.load(sizes_P + tensor) - start, CHUNK).to(tl.int32)
    if ((address % 16) == 0) & (count % 4 == 0):
        total = _sum_of_squares(address, count // 4 * 4, DTYPE, BLOCK, IS_ALIGNED=True)
    else:
        total = _sum_of_squares(address, count, DTYPE, BLOCK, IS_ALIGNED=False)
    tl.store(sums_C + chunk, total)


@triton.jit
def _sum_of_squares(
    address, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr
):
    pointer = _pointer(address, DTYPE, IS_ALIGNED)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        x = tl.load(pointer + place, mask=place < count, other=0.0).to(tl.float32)
        sums += x * x
    return tl.sum(sums, 0)


@triton.jit
def sum_kernel(sums_C, num_chunks, total, BLOCK_C: tl.constexpr):
    """One program adds all: always in the same order."""
    sums = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, num_chunks, BLOCK_C):
        place = first + tl.arange(0, BLOCK_C)
        sums += tl.load(sums_C + place, mask=place < num_chunks, other=0.0)
    tl.store(total, tl.sum(sums, 0))


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """An address as a pointer; if aligned, the compiler may load 16 bytes at a time."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
