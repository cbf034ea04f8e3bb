"""Gradients of biases from those who read what they were added to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longtake.ops import bias_gradient as module
from longtake.ops.attention import self_attention
from longtake.ops.bias_gradient import with_bias_gradient
from longtake.ops.gated_linear import gated_linear
from longtake.ops.kernels import KernelConfig, kernels_as
from longtake.ops.temporal_attention import temporal_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, S, A, E = 2, 3, 5, 2, 8


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def gradients(function, y: Tensor, bias: Tensor):
    y, bias = y.detach().requires_grad_(), bias.detach().requires_grad_()
    out = function(y, bias)
    incoming = draw(*out.shape, dtype=torch.bfloat16, seed=1).to(out)  # the same in any dtype
    return out.detach(), *torch.autograd.grad(out, (y, bias), incoming)


def once_recomputed(y: Tensor, bias: Tensor):
    return checkpoint(with_bias_gradient, y, bias, use_reentrant=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("elementwise", ["auto", "triton"])
def test_bias_has_the_gradient_of_one_that_is_added(elementwise, dtype):
    if elementwise == "triton" and dtype == torch.float64:
        pytest.skip("the kernels do not take it")
    y, bias = draw(B, T, S, 3, A, E, dtype=dtype), draw(3, A, E, dtype=dtype)
    right = gradients(lambda y, bias: y + (bias - bias.detach()), y.double(), bias.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.compiler.reset()
    compiled = torch.compile(with_bias_gradient, fullgraph=True, backend="aot_eager")
    for function in (with_bias_gradient, compiled, once_recomputed):
        with kernels_as(KernelConfig(elementwise=elementwise)):
            found = gradients(function, y, bias)
        assert found[0].equal(y)
        for gradient, expected in zip(found[1:], right[1:], strict=True):
            assert gradient.dtype == dtype
            expected = expected.to(dtype)
            torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


def test_nothing_is_copied_and_a_frozen_bias_costs_no_sum(monkeypatch):
    y = draw(B, T, 3, A, E).requires_grad_()
    monkeypatch.delattr(module, "column_sum")
    out = with_bias_gradient(y, draw(3, A, E))
    assert out.data_ptr() == y.data_ptr()
    out.sum().backward()
    with pytest.raises(NameError, match="column_sum"):
        with_bias_gradient(y, draw(3, A, E).requires_grad_()).sum().backward()


@pytest.mark.parametrize("parts", [1, 2])
def test_bias_of_the_first_parts_has_their_gradient(parts: int):
    y, bias = draw(B, T, S, 3, A, E), draw(parts, A, E)
    _, dy, dbias = gradients(with_bias_gradient, y, bias)
    torch.testing.assert_close(dbias, dy[..., :parts, :, :].sum((0, 1, 2)))


ATTENTIONS = {
    "self_attention": lambda qkv: self_attention(qkv.flatten(0, 1)).unflatten(0, (B, T)),
    "temporal_attention": temporal_attention,
}


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_biases_of_attention_have_the_gradients_of_those_that_are_added(kind, backend, is_compiled):
    """q's from the product, none for k's, v's from the layer behind; also where in float64 they are
    added by autograd's own addition."""
    product, bias = draw(B, T, S, 3, A, E), draw(3, A, E, seed=3)
    x, gate = draw(B, T, S, A * E, seed=4), draw(B, 1, 1, A * E, seed=5)
    layer = draw(A * E, A * E, seed=6) / A, draw(A * E, seed=7)

    def branch(y: Tensor, bias: Tensor) -> Tensor:
        to = {"dtype": y.dtype, "device": y.device}
        y = with_bias_gradient(y + bias.detach(), bias[:1])
        attended = ATTENTIONS[kind](y).flatten(-2)
        inputs = (t.to(**to) for t in (x, gate))
        return gated_linear(*inputs, attended, *(t.to(**to) for t in layer), bias[2].flatten())

    def plain(y: Tensor, bias: Tensor) -> Tensor:
        return x + gate * torch.nn.functional.linear(ATTENTIONS[kind](y + bias).flatten(-2), *layer)

    with kernels_as(KernelConfig(**{kind: "reference"})):
        right = gradients(plain, product, bias)
    if is_compiled:
        torch.compiler.reset()
        branch = torch.compile(branch, fullgraph=True, backend="aot_eager")
    with kernels_as(KernelConfig(elementwise="triton", **{kind: backend})):
        found = gradients(branch, product.float(), bias.float())
    for value, expected in zip(found, right, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
    assert not found[2][1].any(), "the bias of k moves nothing"
    assert right[2][1].abs().max() < 1e-12
