"""Gradients of biases from those who read what they were added to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longtake.ops import bias_gradient as module
from longtake.ops.attention import self_attention
from longtake.ops.bias_gradient import attend_with_bias, with_bias_gradient
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
    attend_with_bias(lambda qkv: qkv.sum(-3), y, draw(3, A, E)).sum().backward()
    for function in (
        with_bias_gradient,
        lambda y, bias: attend_with_bias(lambda qkv: qkv.sum(-3), y, bias),
    ):
        with pytest.raises(NameError, match="column_sum"):
            function(y, draw(3, A, E).requires_grad_()).sum().backward()


ATTENTIONS = {
    "self_attention": lambda qkv: self_attention(qkv.flatten(0, 1)).unflatten(0, (B, T)),
    "temporal_attention": temporal_attention,
}


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_gives_the_bias_the_gradient_of_one_that_it_adds(kind, backend, is_compiled):
    """Also where in float64 the bias is added by autograd's own addition."""
    product, bias = draw(B, T, S, 3, A, E), draw(3, A, E, seed=3)
    with kernels_as(KernelConfig(**{kind: "reference"})):
        right = gradients(lambda y, bias: ATTENTIONS[kind](y + bias), product, bias)

    def attend(y: Tensor, bias: Tensor) -> Tensor:
        return attend_with_bias(ATTENTIONS[kind], y + bias.detach(), bias)

    if is_compiled:
        torch.compiler.reset()
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with kernels_as(KernelConfig(elementwise="triton", **{kind: backend})):
        found = gradients(attend, product.float(), bias.float())
    for value, expected in zip(found, right, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
    assert not found[2][1].any(), "the bias of k moves nothing"
    assert right[2][1].abs().max() < 1e-12
