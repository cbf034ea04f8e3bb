"""What the tests of the element-wise operations share: inputs, and how exact a kernel has to be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.ops.kernels import PLAIN, KernelConfig, kernels_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = KernelConfig(elementwise="triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, rounded to the dtype."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(DEVICE, dtype)


def outputs_and_gradients(
    operation: Callable[..., Tensor], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """By name; the gradient that comes in is not constant, and exact in every dtype."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = operation(**leaves)
    incoming = draw(*out.shape, dtype=torch.bfloat16, seed=99).to(out.dtype)
    gradients = torch.autograd.grad(out, tuple(leaves.values()), incoming)
    return {"output": out.detach()} | dict(zip(inputs, gradients, strict=True))


def assert_as_exact_as_plain(
    operation: Callable[..., Tensor], inputs: dict[str, Tensor], *, cancelled: float = 0.0
) -> None:
    """Output and every gradient: error against float64 at most twice that of plain torch.

    `cancelled` is the size of what cancels to nothing in exact arithmetic, and in plain torch.
    """
    with kernels_as(PLAIN):
        exact = outputs_and_gradients(operation, {k: x.double() for k, x in inputs.items()})
        plain = outputs_and_gradients(operation, inputs)
    with kernels_as(TRITON):
        found = outputs_and_gradients(operation, inputs)
    for name, value in found.items():
        assert value.shape == plain[name].shape, name
        assert value.dtype == plain[name].dtype, name
        error, allowed = (_error(x, exact[name]) for x in (value, plain[name]))
        slack = 1e-6 * exact[name].abs().max() + torch.finfo(value.dtype).eps * cancelled
        assert error <= 2 * allowed + slack, f"{name}: {error} > 2 * {allowed} + {slack}"


def _error(found: Tensor, exact: Tensor) -> Tensor:
    return (found.double() - exact).abs().max()


def assert_close(found: Tensor, exact: Tensor) -> None:
    """The float64 values, rounded to the dtype of `found` from sums in float32."""
    eps = torch.finfo(found.dtype).eps
    scale = exact.abs().max().item()
    torch.testing.assert_close(found.double(), exact, rtol=2 * eps, atol=4e-6 * scale)


def assert_compiled_equals_eager(
    operation: Callable[..., Tensor], inputs: dict[str, Tensor]
) -> None:
    """torch.compile takes the operation whole and gives the same bits, backward included."""
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    with kernels_as(TRITON):
        expected = outputs_and_gradients(operation, inputs)
        found = outputs_and_gradients(compiled, inputs)
    for name, value in found.items():
        assert value.equal(expected[name]), name
