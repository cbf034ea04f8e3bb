"""Products with an epilogue, against float64: by cuBLASLt on a GPU, in separate steps elsewhere."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.ops import cublaslt, products
from longtake.ops.cublaslt import runs_cublaslt
from longtake.ops.kernels import kernels_as
from longtake.ops.products import gelu_input_gradient, residual_product
from longtake.ops.weight_gradient import weight_gradient
from tests.ops.elementwise_checks import DEVICE, DTYPES, TRITON, draw

pytest.importorskip("triton")
torch.set_num_threads(1)

# Samples, tokens, outputs and inputs; the last has rows that cuBLASLt cannot read.
SHAPES = [(1, 40, 24, 16), (3, 16, 8, 32), (2, 5, 7, 3)]


def assert_as_exact_as_plain(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    assert found.dtype == plain.dtype
    assert found.shape == exact.shape
    error, allowed = ((x.double() - exact).abs().max() for x in (found, plain))
    assert error <= 2 * allowed + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_adds_the_stream(shape: tuple[int, ...], dtype: torch.dtype):
    B, N, D, K = shape
    tensors = [draw(B, N, D), draw(B, N, K), draw(B, D, K), draw(B, D)]
    tensors = [x.to(dtype) for x in tensors]

    def plain(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x + (h @ weight.mT + bias[:, None])

    with kernels_as(TRITON):
        found = residual_product(*tensors)
    assert_as_exact_as_plain(found, plain(*tensors), plain(*(x.double() for x in tensors)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_takes_the_gelus_gradient(shape: tuple[int, ...], dtype: torch.dtype):
    B, N, D, K = shape
    tensors = [x.to(dtype) for x in (draw(B, N, K), draw(B, K, D), 2 * draw(B, N, D))]

    def plain(dy: Tensor, weight: Tensor, pre: Tensor) -> Tensor:
        pre = pre.clone().requires_grad_()
        return torch.autograd.grad(F.gelu(pre, approximate="tanh"), pre, dy @ weight)[0]

    with kernels_as(TRITON):
        found = gelu_input_gradient(*tensors)
        if B == 1:
            alone = gelu_input_gradient(*(x[0] for x in tensors))
            assert alone.equal(found[0])
    assert_as_exact_as_plain(found, plain(*tensors), plain(*(x.double() for x in tensors)))


def test_operands_that_are_not_contiguous_or_aligned():
    weight_BDI = draw(2, 16, 8).mT.contiguous().mT
    x_BND, h_BNI = draw(2, 2 * 24, 16)[:, ::2], draw(2 * 24 * 8 + 1)[1:].view(2, 24, 8)
    tensors = [x.to(torch.bfloat16) for x in (x_BND, h_BNI, weight_BDI, draw(2, 16))]
    shifted = torch.empty(tensors[1].numel() + 1, dtype=torch.bfloat16, device=DEVICE)[1:]
    tensors[1] = shifted.view_as(tensors[1]).copy_(tensors[1])
    exact = [x.double() for x in tensors]
    with kernels_as(TRITON):
        found = residual_product(*tensors)
    expected = exact[0] + exact[1] @ exact[2].mT + exact[3][:, None]
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("outputs", [4, 20], ids=["wide", "narrow"])
def test_weight_gradients_of_samples(outputs: int):
    dy_BNO, x_BNI = draw(3, 10, outputs), draw(3, 10, 16)
    found = weight_gradient(dy_BNO, x_BNI)
    for b in range(3):
        torch.testing.assert_close(found[b], weight_gradient(dy_BNO[b], x_BNI[b]))
        torch.testing.assert_close(found[b], dy_BNO[b].T @ x_BNI[b])


def test_operations_are_what_they_are_registered_as():
    tensors = (draw(2, 8, 16), draw(2, 8, 24), draw(2, 16, 24), draw(2, 16))
    torch.library.opcheck(products._residual_product, tensors)
    tensors = (draw(2, 8, 16), draw(2, 16, 24), draw(2, 8, 24))
    torch.library.opcheck(products._gelu_input_gradient, tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_problem_without_a_kernel_is_told_once_and_computed_in_steps(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tensors = [x.bfloat16() for x in (draw(1, 8, 16), draw(1, 8, 24), draw(1, 16, 24), draw(1, 16))]
    assert runs_cublaslt(*tensors)
    expected = residual_product(*tensors)
    cublaslt._plan.cache_clear()
    monkeypatch.setattr(cublaslt, "_COMPUTE_32F", 9999)  # no such way of computing
    with caplog.at_level(logging.WARNING):
        found = [residual_product(*tensors) for _ in range(2)]
    cublaslt._plan.cache_clear()
    assert len(caplog.records) == 1, caplog.text
    for value in found:
        torch.testing.assert_close(value, expected, rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_on_another_stream_and_thread_are_the_same():
    tensors = [
        x.bfloat16() for x in (draw(1, 512, 64), draw(1, 512, 64), draw(1, 64, 64), draw(1, 64))
    ]
    expected = residual_product(*tensors)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = residual_product(*tensors)
    torch.cuda.synchronize()
    assert found.equal(expected)
