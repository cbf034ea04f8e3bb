"""norm_modulate's kernels against plain torch and float64."""

# Inputs are dicts of tensors, spread over parameters of which some are floats.
# pyright: reportArgumentType=false

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.ops import norm_modulate as module
from longtake.ops.kernels import kernels_as
from longtake.ops.norm_modulate import (
    norm_modulate,
    norm_modulate_backward,
    norm_modulate_forward,
    norm_modulate_reference,
)
from tests.ops.elementwise_checks import (
    DEVICE,
    DTYPES,
    TRITON,
    assert_as_exact_as_plain,
    assert_close,
    assert_compiled_equals_eager,
    draw,
)

pytest.importorskip("triton")
torch.set_num_threads(1)

# (B, tokens..., D). Rows of one part, of two, of two with the tail not full; several programs.
SHAPES = {
    "XL": (1, 3, 1152),
    "tiny": (2, 9, 128),
    "S": (1, 5, 384),
    "tail not full": (2, 2, 3, 100),
    "one value": (2, 2, 1),
    "one token": (3, 1, 12),
}


def _inputs(*shape: int, dtype: torch.dtype, row_dtype: torch.dtype | None = None):
    row_shape = (shape[0], *(1 for _ in shape[1:-1]), shape[-1])
    return {
        "x_BND": draw(*shape, dtype=dtype, seed=1) * 2 + 1,
        "shift_B1D": draw(*row_shape, dtype=row_dtype or dtype, seed=2),
        "scale_B1D": draw(*row_shape, dtype=row_dtype or dtype, seed=3),
    }


def _raw_inputs(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, shift, scale, dh, carried."""
    x, shift, scale = _inputs(*shape, dtype=dtype).values()
    dh, carried = (draw(*shape, dtype=dtype, seed=seed) for seed in (4, 5))
    return x, shift.flatten(0, -2), scale.flatten(0, -2), dh, carried


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_is_as_exact_as_plain(shape: tuple[int, ...], dtype: torch.dtype):
    # One value alone has no gradient: it is less its own mean, over the square root of eps. A GPU's
    # fused multiply-add leaves the rounding of the product.
    cancelled = 4 / 1e-6**0.5 if shape[-1] == 1 else 0.0
    assert_as_exact_as_plain(norm_modulate, _inputs(*shape, dtype=dtype), cancelled=cancelled)


def test_float32_rows_modulate_bfloat16_tokens():
    inputs = _inputs(2, 3, 24, dtype=torch.bfloat16, row_dtype=torch.float32)
    assert_as_exact_as_plain(norm_modulate, inputs)


def test_far_from_zero_the_deviation_does_not_cancel():
    inputs = _inputs(1, 4, 24, dtype=torch.float32)
    inputs["x_BND"] = inputs["x_BND"] + 3000
    assert_as_exact_as_plain(norm_modulate, inputs)


def test_strided_tokens_and_rows_within_a_wider_product():
    x = draw(5, 2, 24).transpose(0, 1)
    shift, _, scale = draw(2, 1, 72, seed=2).chunk(3, dim=-1)
    inputs = {"x_BND": x, "shift_B1D": shift, "scale_B1D": scale}
    assert not any(value.is_contiguous() for value in inputs.values())
    assert_as_exact_as_plain(norm_modulate, inputs)
    inputs["shift_B1D"] = draw(24, 1, 2).transpose(0, 2)  # not even values of a row adjoin
    assert_as_exact_as_plain(norm_modulate, inputs)


def test_long_samples_are_shared_by_programs_that_loop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FORWARD_PROGRAMS", 2)
    monkeypatch.setattr(module, "BACKWARD_PROGRAMS", 6)
    assert_as_exact_as_plain(norm_modulate, _inputs(2, 17, 24, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [24, 128])
def test_backward_adds_what_the_stream_carries_and_returns_the_output(
    hidden_size: int, dtype: torch.dtype
):
    x, shift, scale, dh, carried = _raw_inputs(2, 6, hidden_size, dtype=dtype)
    h, mean, rstd = norm_modulate_forward(x, shift, scale, 1e-6)
    dx, dshift, dscale, again = norm_modulate_backward(
        dh, x, mean, rstd, shift, scale, carried, True
    )
    leaves = [value.double().requires_grad_() for value in (x, shift, scale)]
    exact_h = norm_modulate_reference(leaves[0], leaves[1][:, None], leaves[2][:, None], 1e-6)
    exact_dx, exact_dshift, exact_dscale = torch.autograd.grad(exact_h, leaves, dh.double())
    assert h.dtype == again.dtype == dx.dtype == dtype
    assert mean.dtype == rstd.dtype == dshift.dtype == dscale.dtype == torch.float32
    assert_close(h, exact_h.detach())
    assert_close(again, exact_h.detach())
    assert_close(mean, x.double().mean(-1))
    assert_close(dx, exact_dx + carried.double())
    assert_close(dshift, exact_dshift)
    assert_close(dscale, exact_dscale)


def test_backward_leaves_out_what_is_not_asked_for():
    x, shift, scale, dh, _ = _raw_inputs(2, 6, 24, dtype=torch.float32)
    _, mean, rstd = norm_modulate_forward(x, shift, scale, 1e-6)
    *lean, empty = norm_modulate_backward(dh, x, mean, rstd, shift, scale, None, False)
    zeros = torch.zeros_like(x)
    *full, _ = norm_modulate_backward(dh, x, mean, rstd, shift, scale, zeros, True)
    assert empty.numel() == 0
    assert all(a.equal(b) for a, b in zip(lean, full, strict=True))


def test_no_tokens_give_zero_sums():
    x, shift, scale, dh, _ = _raw_inputs(2, 0, 24, dtype=torch.float32)
    h, mean, rstd = norm_modulate_forward(x, shift, scale, 1e-6)
    dx, dshift, dscale, _ = norm_modulate_backward(dh, x, mean, rstd, shift, scale, None, False)
    assert h.shape == dx.shape == (2, 0, 24)
    assert dshift.equal(torch.zeros(2, 24, device=DEVICE))
    assert dscale.equal(dshift)


@pytest.mark.parametrize("with_output", [False, True])
def test_custom_operations_are_what_they_are_registered_as(with_output: bool):
    x, shift, scale, dh, carried = _raw_inputs(2, 3, 12, dtype=torch.bfloat16)
    torch.library.opcheck(module._forward, (x, shift, scale, 1e-6))
    _, mean, rstd = norm_modulate_forward(x, shift, scale, 1e-6)
    arguments = (dh, x, mean, rstd, shift, scale, carried if with_output else None, with_output)
    torch.library.opcheck(module._backward, arguments)


def test_compiled_whole_equals_eager():
    assert_compiled_equals_eager(norm_modulate, _inputs(2, 2, 3, 24, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(1, 1, 12), (2, 3, 12), (2, 12)], ids=str)
def test_anything_but_one_row_per_sample_is_refused(shape: tuple[int, ...]):
    inputs = _inputs(2, 3, 12, dtype=torch.float32) | {"scale_B1D": draw(*shape)}
    with kernels_as(TRITON), pytest.raises(ValueError, match=r"one row per sample, \(2, 1, 12\)"):
        norm_modulate(**inputs)


def test_float64_is_refused_by_the_kernels_when_asked_for():
    inputs = _inputs(2, 3, 12, dtype=torch.float64)
    with kernels_as(TRITON), pytest.raises(ValueError, match=r"x is torch.float64.*reference"):
        norm_modulate(**inputs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="4.8 GB per tensor, and the interpreter is slow")
def test_more_than_two_to_the_31_values():
    rows = 2**31 // 1152 + 5
    x = torch.randn(1, rows, 1152, device=DEVICE, dtype=torch.bfloat16)
    shift, scale = torch.randn(2, 1, 1152, device=DEVICE, dtype=torch.bfloat16)
    h, mean, rstd = norm_modulate_forward(x, shift, scale, 1e-6)
    dx, _, _, _ = norm_modulate_backward(x, x, mean, rstd, shift, scale, None, False)
    last = x[:, -9:].contiguous()
    last_h, last_mean, last_rstd = norm_modulate_forward(last, shift, scale, 1e-6)
    assert h[:, -9:].equal(last_h)
    last_dx, *_ = norm_modulate_backward(
        last, last, last_mean, last_rstd, shift, scale, None, False
    )
    assert dx[:, -9:].equal(last_dx)
