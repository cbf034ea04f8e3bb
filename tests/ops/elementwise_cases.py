"""Element-wise kernels as training launches them, for `compile_all_cases`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import longtake.ops.column_sum  # noqa: F401  (defines the operator)
from longtake.ops.gated_residual import gated_residual_backward, gated_residual_forward
from longtake.ops.gelu import gelu_backward, gelu_forward
from longtake.ops.norm_modulate import norm_modulate_backward, norm_modulate_forward
from longtake.ops.philox import philox_words
from longtake.ops.resize_heads import launch_resize
from longtake.ops.sample_weights import merge_sample_gradients

# Of XL, S, B, L and tiny models, with and without a tail.
HIDDEN_SIZES = (1152, 384, 768, 1024, 128)


def _norm_modulate(hidden_size: int, dtype: torch.dtype) -> None:
    x, dh, carried = torch.zeros(3, 2, 64, hidden_size, dtype=dtype)
    shift, scale = torch.zeros(2, 2, hidden_size, dtype=dtype)
    _, mean, rstd = norm_modulate_forward(x, shift, scale, 1e-6)
    norm_modulate_backward(dh, x, mean, rstd, shift, scale, carried, True)


def _norm_modulate_alone(hidden_size: int) -> None:
    x, dh = torch.zeros(2, 2, 64, hidden_size, dtype=torch.bfloat16)
    mean, rstd = torch.zeros(2, 2, 64)
    shift, scale = torch.zeros(2, 2, hidden_size)  # float32
    norm_modulate_backward(dh, x, mean, rstd, shift, scale, None, False)


def _gated_residual(hidden_size: int, dtype: torch.dtype) -> None:
    x, y, dout = torch.zeros(3, 2, 64, hidden_size, dtype=dtype)
    gate = torch.zeros(2, hidden_size, dtype=dtype)
    gated_residual_forward(x, gate, y)
    gated_residual_backward(dout, gate, y)


def _residual_without_gate(hidden_size: int) -> None:
    x, y = torch.zeros(2, 2, 64, hidden_size, dtype=torch.bfloat16)
    gated_residual_forward(x, None, y)


def _gelu(inner_size: int, dtype: torch.dtype) -> None:
    dact, pre = torch.zeros(2, 64, inner_size, dtype=dtype)
    gelu_forward(pre)
    gelu_backward(dact, pre, True)


def _column_sum(x: Tensor) -> None:
    # The public function would not pick a kernel for a CPU.
    torch.ops.longtake.column_sum(x)


def _resize_heads(head_size: int, size: int) -> None:
    launch_resize(torch.zeros(64, 3, 2, head_size, dtype=torch.bfloat16), size)


def _merge_sample_gradients(hidden_size: int, dtype: torch.dtype) -> None:
    gate, weight = torch.zeros(2, hidden_size, dtype=dtype), torch.zeros(hidden_size, hidden_size)
    weight = weight.to(dtype)
    dsample, sums = weight.expand(2, -1, -1), torch.zeros(2, hidden_size)
    merge_sample_gradients(dsample, sums, gate, weight, gate[0].clone())


def _philox() -> None:
    ids = torch.zeros(2, dtype=torch.int64)
    philox_words(ids, ids, seed=2**62, stream=3, first_block=0, num_blocks=64)


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """(name, launches): bfloat16 as in training, float32 for the largest model."""
    half, full = torch.bfloat16, torch.float32
    cases = []
    for size in HIDDEN_SIZES:
        cases += [
            (f"norm_modulate {size}", lambda size=size: _norm_modulate(size, half)),
            (f"gated_residual {size}", lambda size=size: _gated_residual(size, half)),
        ]
    return [
        *cases,
        ("norm_modulate 1152 float32", lambda: _norm_modulate(1152, full)),
        ("norm_modulate 1152 alone", lambda: _norm_modulate_alone(1152)),
        ("gated_residual 1152 float32", lambda: _gated_residual(1152, full)),
        ("gated_residual 1152 without gate", lambda: _residual_without_gate(1152)),
        ("gelu 4608", lambda: _gelu(4608, half)),
        ("gelu 4608 float32", lambda: _gelu(4608, full)),
        ("column_sum 1152", lambda: _column_sum(torch.zeros(64, 1152, dtype=half))),
        ("sample_weights 1152", lambda: _merge_sample_gradients(1152, half)),
        ("sample_weights 1152 float32", lambda: _merge_sample_gradients(1152, full)),
        ("sample_weights 1024", lambda: _merge_sample_gradients(1024, half)),
        ("philox", lambda: _philox()),
        ("resize_heads 72 to 96", lambda: _resize_heads(72, 96)),
        ("resize_heads 96 to 72", lambda: _resize_heads(96, 72)),
        ("column_sum 3456", lambda: _column_sum(torch.zeros(64, 3456, dtype=half))),
    ]
