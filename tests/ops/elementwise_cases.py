"""Element-wise kernels as training launches them, for `compile_all_cases`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.ops.column_sum import column_sum
from longtake.ops.gated_residual import gated_residual_backward, gated_residual_forward
from longtake.ops.gelu import gelu_backward, gelu_forward
from longtake.ops.kernels import KernelConfig, kernels_as
from longtake.ops.norm_modulate import norm_modulate_backward, norm_modulate_forward

# Of XL, S, B, L and tiny models, with and without a tail; that of 1408 is not full.
HIDDEN_SIZES = (1152, 384, 768, 1024, 128, 1408)


def _norm_modulate(hidden_size: int, dtype: torch.dtype, row_dtype: torch.dtype) -> None:
    x, dh, carried = torch.zeros(3, 2, 64, hidden_size, dtype=dtype)
    shift, scale = torch.zeros(2, 2, hidden_size, dtype=row_dtype)
    _, mean, rstd = norm_modulate_forward(x, shift, scale, 1e-6)
    norm_modulate_backward(dh, x, mean, rstd, shift, scale, carried, True)
    norm_modulate_backward(dh, x, mean, rstd, shift, scale, None, False)


def _gated_residual(hidden_size: int, dtype: torch.dtype, row_dtype: torch.dtype) -> None:
    x, y, dout = torch.zeros(3, 2, 64, hidden_size, dtype=dtype)
    gate = torch.zeros(2, hidden_size, dtype=row_dtype)
    gated_residual_forward(x, gate, y)
    gated_residual_forward(x, None, y)
    gated_residual_backward(dout, gate, y)
    gated_residual_backward(dout, gate, None)


def _gelu(inner_size: int, dtype: torch.dtype) -> None:
    dact, pre = torch.zeros(2, 64, inner_size, dtype=dtype)
    gelu_forward(pre)
    gelu_backward(dact, pre, True)
    gelu_backward(dact, pre, False)


def _column_sum(x: Tensor) -> None:
    with kernels_as(KernelConfig(elementwise="triton")):
        column_sum(x)


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """(name, launches): bfloat16 as in training, float32 for the largest model."""
    half, full = torch.bfloat16, torch.float32
    cases = []
    for size in HIDDEN_SIZES:
        cases += [
            (f"norm_modulate {size}", lambda size=size: _norm_modulate(size, half, half)),
            (f"gated_residual {size}", lambda size=size: _gated_residual(size, half, half)),
        ]
    return [
        *cases,
        ("norm_modulate 1152 by float32 rows", lambda: _norm_modulate(1152, half, full)),
        ("norm_modulate 1152 float32", lambda: _norm_modulate(1152, full, full)),
        ("gated_residual 1152 float32", lambda: _gated_residual(1152, full, full)),
        ("gelu 4608", lambda: _gelu(4608, half)),
        ("gelu 4608 float32", lambda: _gelu(4608, full)),
        ("column_sum 1152", lambda: _column_sum(torch.zeros(64, 1152, dtype=half))),
        ("column_sum 3456", lambda: _column_sum(torch.zeros(64, 3456, dtype=half))),
        ("column_sum 384 float32", lambda: _column_sum(torch.zeros(64, 384))),
    ]
