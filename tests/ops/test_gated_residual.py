"""gated_residual's kernels against plain torch and float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.ops import gated_residual as module
from longtake.ops.gated_residual import (
    gated_residual,
    gated_residual_backward,
    gated_residual_forward,
)
from longtake.ops.kernels import kernels_as
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


def _inputs(
    *shape: int, dtype: torch.dtype, gate_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    gate_shape = (shape[0], *(1 for _ in shape[1:-1]), shape[-1])
    return {
        "x_BND": draw(*shape, dtype=dtype, seed=1),
        "gate_B1D": draw(*gate_shape, dtype=gate_dtype or dtype, seed=2),
        "y_BND": draw(*shape, dtype=dtype, seed=3) + 0.5,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_is_as_exact_as_plain(shape: tuple[int, ...], dtype: torch.dtype):
    assert_as_exact_as_plain(gated_residual, _inputs(*shape, dtype=dtype))


def test_float32_gate_opens_for_bfloat16_tokens():
    inputs = _inputs(2, 3, 24, dtype=torch.bfloat16, gate_dtype=torch.float32)
    assert_as_exact_as_plain(gated_residual, inputs)


def test_float32_stream_takes_bfloat16_branch():
    inputs = _inputs(2, 3, 24, dtype=torch.bfloat16)
    inputs["x_BND"] = inputs["x_BND"].float()
    assert_as_exact_as_plain(gated_residual, inputs)
    _, gate, y = inputs.values()
    dy, _, _ = gated_residual_backward(inputs["x_BND"], gate[:, 0], y)
    assert dy.dtype == torch.bfloat16


def test_strided_tokens_and_gate_within_a_wider_product():
    _, _, gate = draw(2, 1, 72, seed=2).chunk(3, dim=-1)
    x, y = (draw(5, 2, 24, seed=seed).transpose(0, 1) for seed in (1, 3))
    inputs = {"x_BND": x, "gate_B1D": gate, "y_BND": y}
    assert not any(value.is_contiguous() for value in inputs.values())
    assert_as_exact_as_plain(gated_residual, inputs)


def test_long_samples_are_shared_by_programs_that_loop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FORWARD_PROGRAMS", 2)
    monkeypatch.setattr(module, "BACKWARD_PROGRAMS", 6)
    assert_as_exact_as_plain(gated_residual, _inputs(2, 17, 24, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [24, 128])
def test_backward_gives_the_gradients_of_gate_and_bias(hidden_size: int, dtype: torch.dtype):
    _, gate, y = _inputs(3, 10, hidden_size, dtype=dtype).values()
    dout = draw(3, 10, hidden_size, dtype=dtype, seed=4)
    dy, dgate, dbias = gated_residual_backward(dout, gate[:, 0], y)
    exact_dy = gate.double() * dout.double()
    assert dy.dtype == dtype
    assert dgate.dtype == dbias.dtype == torch.float32
    assert_close(dy, exact_dy)
    assert_close(dgate, (dout.double() * y.double()).sum(1))
    assert_close(dbias, exact_dy.sum((0, 1)))

    without_y = gated_residual_backward(dout, gate[:, 0], None)
    assert without_y[0].equal(dy)
    assert without_y[1].numel() == 0
    assert without_y[2].equal(dbias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [24, 128])
def test_without_a_gate_the_branch_is_added_as_it_is(hidden_size: int, dtype: torch.dtype):
    x, _, y = _inputs(2, 5, hidden_size, dtype=dtype).values()
    assert gated_residual_forward(x, None, y).equal(x + y)  # one rounding, in plain torch too
    dout = draw(2, 5, hidden_size, dtype=dtype, seed=4)
    with kernels_as(TRITON):
        dy, dgate, dbias = gated_residual_backward(dout, None, y)
    assert dy is dout
    assert dgate.numel() == 0
    assert_close(dbias, dout.double().sum((0, 1)))


def test_no_tokens_give_zero_sums():
    gate = draw(2, 24)
    nothing = draw(2, 0, 24)
    assert gated_residual_forward(nothing, gate, nothing).shape == (2, 0, 24)
    dy, dgate, dbias = gated_residual_backward(nothing, gate, nothing)
    assert dy.shape == (2, 0, 24)
    assert dgate.equal(torch.zeros(2, 24, device=DEVICE))
    assert dbias.equal(torch.zeros(24, device=DEVICE))


@pytest.mark.parametrize("is_whole", [False, True])
def test_custom_operations_are_what_they_are_registered_as(is_whole: bool):
    x, gate, y = _inputs(2, 3, 12, dtype=torch.bfloat16).values()
    gate = gate[:, 0]
    torch.library.opcheck(module._forward, (x, gate if is_whole else None, y))
    torch.library.opcheck(module._backward, (x, gate, y if is_whole else None))


def test_compiled_whole_equals_eager():
    assert_compiled_equals_eager(gated_residual, _inputs(2, 2, 3, 24, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(1, 1, 12), (2, 3, 12), (2, 12)], ids=str)
def test_anything_but_one_gate_per_sample_is_refused(shape: tuple[int, ...]):
    inputs = _inputs(2, 3, 12, dtype=torch.float32) | {"gate_B1D": draw(*shape)}
    with kernels_as(TRITON), pytest.raises(ValueError, match=r"one row per sample, \(2, 1, 12\)"):
        gated_residual(**inputs)


def test_float64_is_refused_by_the_kernels_when_asked_for():
    inputs = _inputs(2, 3, 12, dtype=torch.float64)
    with kernels_as(TRITON), pytest.raises(ValueError, match=r"x is torch.float64.*reference"):
        gated_residual(**inputs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="4.8 GB per tensor, and the interpreter is slow")
def test_more_than_two_to_the_31_values():
    rows = 2**31 // 1152 + 5
    x = torch.randn(1, rows, 1152, device=DEVICE, dtype=torch.bfloat16)
    gate = torch.randn(1, 1152, device=DEVICE, dtype=torch.bfloat16)
    last = x[:, -9:].contiguous()
    out = gated_residual_forward(x, gate, x)
    assert out[:, -9:].equal(gated_residual_forward(last, gate, last))
    dy, _, _ = gated_residual_backward(x, gate, x)
    assert dy[:, -9:].equal(gated_residual_backward(last, gate, last)[0])
