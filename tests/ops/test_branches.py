"""Operations that hold a linear layer and what stands beside it: fused against plain torch."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longtake.ops.carried_linear import carried_linear
from longtake.ops.gated_linear import gated_linear
from longtake.ops.gated_mlp import gated_mlp
from longtake.ops.kernels import PLAIN, KernelConfig, kernels_as
from longtake.ops.modulated_linear import modulated_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = KernelConfig(elementwise="triton")
B, T, S, D = 2, 3, 5, 24


def _ungated(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gated_linear(x, None, y, weight, bias)


# Operation, and its inputs by name with their shapes (row: one per sample).
OPERATIONS = {
    "carried_linear": (carried_linear, {"x": "x", "weight": (40, D), "bias": (40,)}),
    "modulated_linear": (
        modulated_linear,
        {"x": "x", "shift": "row", "scale": "row", "weight": (40, D), "bias": (40,)},
    ),
    "gated_linear": (
        gated_linear,
        {"x": "x", "gate": "row", "h": "inner", "weight": (D, 40), "bias": (D,)},
    ),
    "added_linear": (_ungated, {"x": "x", "h": "inner", "weight": (D, 40), "bias": (D,)}),
    "gated_mlp": (
        gated_mlp,
        {"x": "x", "shift": "row", "scale": "row", "gate": "row"}
        | {"weight1": (40, D), "bias1": (40,), "weight2": (D, 40), "bias2": (D,)},
    ),
}


def _inputs(name: str, dtype: torch.dtype, token_dims: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (B, *token_dims, D),
        "inner": (B, *token_dims, 40),
        "row": (B, *(1,) * len(token_dims), D),
    }
    inputs = {}
    for key, shape in OPERATIONS[name][1].items():
        size = shapes[shape] if isinstance(shape, str) else shape
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        if key.startswith("weight"):
            values /= size[-1] ** 0.5
        inputs[key] = values.to(DEVICE, dtype).requires_grad_()
    return inputs


def _run(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name; every output gets a gradient that is not constant."""
    outputs = OPERATIONS[name][0](*inputs.values())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, tuple(inputs.values()), incoming)
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return found | dict(zip(inputs, gradients, strict=True))


@pytest.mark.parametrize(
    ("dtype", "token_dims"),
    [(torch.float32, (T, S)), (torch.bfloat16, (T * S,)), (torch.float16, (T, S))],
    ids=str,
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_fused_is_as_exact_as_plain(name: str, dtype: torch.dtype, token_dims: tuple[int, ...]):
    inputs = _inputs(name, dtype, token_dims)
    exact_inputs = {key: x.detach().double().requires_grad_() for key, x in inputs.items()}
    with kernels_as(PLAIN):
        exact, plain = _run(name, exact_inputs), _run(name, inputs)
    with kernels_as(FUSED):
        fused = _run(name, inputs)
    for key, value in fused.items():
        assert value.shape == plain[key].shape, key
        assert value.dtype == dtype, key
        error, allowed = (
            (found.double() - exact[key]).abs().max() for found in (value, plain[key])
        )
        slack = 1e-6 if dtype == torch.float32 else 0
        assert error <= 2 * allowed + slack * exact[key].abs().max(), key


@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_whole_equals_eager(name: str):
    inputs = _inputs(name, torch.float32, (T, S))
    with kernels_as(FUSED):
        expected = _run(name, inputs)
        outputs = torch.compile(OPERATIONS[name][0], fullgraph=True, backend="aot_eager")(
            *inputs.values()
        )
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        incoming = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
        gradients = torch.autograd.grad(outputs, tuple(inputs.values()), incoming)
    for i, out in enumerate(outputs):
        assert out.equal(expected[f"output {i}"])
    for key, gradient in zip(inputs, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[key], rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", OPERATIONS)
def test_recomputing_it_gives_the_same_gradients(name: str):
    inputs = _inputs(name, torch.float32, (T, S))
    with kernels_as(FUSED):
        expected = _run(name, inputs)
        outputs = checkpoint(OPERATIONS[name][0], *inputs.values(), use_reentrant=False)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        incoming = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
        gradients = torch.autograd.grad(outputs, tuple(inputs.values()), incoming)
    for key, gradient in zip(inputs, gradients, strict=True):
        assert gradient.equal(expected[key]), key


@pytest.mark.parametrize("name", OPERATIONS)
def test_stream_that_nobody_else_reads_has_a_gradient(name: str):
    inputs = _inputs(name, torch.float32, (T, S))
    with kernels_as(FUSED):
        outputs = OPERATIONS[name][0](*inputs.values())
    last = outputs[-1] if isinstance(outputs, tuple) else outputs
    last.sum().backward()  # an expanded gradient, and none for the stream of the carrying ones
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs.values())


@pytest.mark.parametrize("shape", [(1, 1, D), (1, B, D), (B, T * S, D), (B, D)], ids=str)
def test_anything_but_one_row_per_sample_is_refused(shape: tuple[int, ...]):
    inputs = _inputs("modulated_linear", torch.float32, (T * S,))
    inputs["shift"] = torch.zeros(shape, device=DEVICE)
    with kernels_as(FUSED), pytest.raises(ValueError, match=r"one row per sample, \(2, 1, 24\)"):
        modulated_linear(*inputs.values())


def test_kernels_that_cannot_run_are_refused_by_name(monkeypatch):
    monkeypatch.setattr("longtake.ops.kernels.has_triton", False)
    inputs = _inputs("carried_linear", torch.float32, (T * S,))
    with kernels_as(FUSED), pytest.raises(ValueError, match=r"Triton is not installed.*reference"):
        carried_linear(*inputs.values())
