"""Gradients of gate, weight and bias from those of a weight for each sample, against float64."""

from __future__ import annotations

import pytest
import torch

from longtake.ops import sample_weights as module
from longtake.ops.sample_weights import merge_sample_gradients, merge_sample_gradients_reference
from tests.ops.elementwise_checks import DTYPES, assert_close, draw

pytest.importorskip("triton")
torch.set_num_threads(1)

# Samples, outputs and inputs: a row that is a power of two, is not, or is one value.
SHAPES = [(1, 3, 16), (5, 7, 40), (2, 5, 72), (3, 2, 1), (2, 4, 1152)]


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype):
    B, D, K = shape
    sums = draw(B, D, seed=1)
    gate, weight, bias = draw(B, D, seed=2), draw(D, K, seed=3), draw(D, seed=4)
    return draw(B, D, K, dtype=dtype), sums, *(x.to(dtype) for x in (gate, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_gives_the_gradients_of_gate_weight_and_bias(shape, dtype: torch.dtype):
    inputs = _inputs(shape, dtype)
    found = merge_sample_gradients(*inputs)
    exact = merge_sample_gradients_reference(*(x.double() for x in inputs))
    assert [value.dtype for value in found] == [dtype, dtype, torch.float32]
    for value, plain, right in zip(
        found, merge_sample_gradients_reference(*inputs), exact, strict=True
    ):
        assert value.dtype == plain.dtype
        assert_close(value, right)
        assert_close(plain, right)


def test_reference_is_what_autograd_makes_of_gate_times_weight():
    dsample, sums, *layer = (x.double() for x in _inputs((3, 4, 6), torch.float32))
    gate, weight, bias = (x.requires_grad_() for x in layer)
    weights, biases = gate[:, :, None] * weight, gate * bias
    right = torch.autograd.grad((weights, biases), (gate, weight, bias), (dsample, sums))
    for value, expected in zip(
        merge_sample_gradients_reference(dsample, sums, gate, weight, bias), right, strict=True
    ):
        torch.testing.assert_close(value, expected)


def test_operands_that_lie_apart():
    dsample, sums, gate, weight, bias = _inputs((3, 4, 24), torch.float32)
    expected = merge_sample_gradients(dsample, sums, gate, weight, bias)
    found = merge_sample_gradients(
        dsample.mT.contiguous().mT,
        sums,
        torch.cat((gate, gate), dim=1).chunk(2, dim=1)[1],
        weight.T.contiguous().T,
        bias,
    )
    for value, right in zip(found, expected, strict=True):
        assert value.equal(right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operation_is_what_it_is_registered_as(dtype: torch.dtype):
    torch.library.opcheck(module._merge, _inputs((2, 3, 40), dtype))
