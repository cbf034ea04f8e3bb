"""Operations that hold a linear layer and what stands beside it: fused against plain torch."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from longtake.ops.carried_linear import _add_product, carried_linear
from longtake.ops.gated_linear import gated_linear
from longtake.ops.gated_mlp import gated_mlp
from longtake.ops.kernels import PLAIN, KernelConfig, kernels_as
from longtake.ops.modulated_linear import modulated_linear

# A backward alone in a thread that has not used the GPU yet may begin with a product.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = KernelConfig(elementwise="triton")
B, T, S, D = 2, 3, 5, 24


def _keeping_linear(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    return modulated_linear(*inputs, recompute=False)


def _keeping_mlp(*inputs: Tensor) -> Tensor:
    return gated_mlp(*inputs, recompute=False)


def _ungated(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gated_linear(x, None, y, weight, bias)


def _reading_biased(x: Tensor, *rest: Tensor) -> Tensor:
    """The layer's input has its bias in it already."""
    gate, h, weight, bias, input_bias = rest
    return gated_linear(x, gate, h + input_bias.detach(), weight, bias, input_bias)


_MODULATED = {"x": "x", "shift": "row", "scale": "row", "weight": (40, D), "bias": (40,)}
_MLP = {"x": "x", "shift": "row", "scale": "row", "gate": "row"} | {
    "weight1": (4 * D, D),
    "bias1": (4 * D,),
    "weight2": (D, 4 * D),  # wide, so that its gradient is taken as a transpose
    "bias2": (D,),
}
_NARROW_MLP = _MLP | {"weight1": (6, D), "bias1": (6,), "weight2": (D, 6)}
# Operation, and its inputs by name with their shapes (row: one per sample).
OPERATIONS = {
    "carried_linear": (carried_linear, {"x": "x", "weight": (40, D), "bias": (40,)}),
    "modulated_linear": (modulated_linear, _MODULATED),
    "keeping_linear": (_keeping_linear, _MODULATED),
    "gated_linear": (
        gated_linear,
        {"x": "x", "gate": "row", "h": "inner", "weight": (D, 40), "bias": (D,)},
    ),
    "added_linear": (_ungated, {"x": "x", "h": "inner", "weight": (D, 40), "bias": (D,)}),
    # So few inputs for the tokens of a sample that the gate goes into the weights.
    "folded_linear": (
        gated_linear,
        {"x": "x", "gate": "row", "h": "narrow", "weight": (D, 6), "bias": (D,)},
    ),
    "gated_biased": (
        _reading_biased,
        {"x": "x", "gate": "row", "h": "inner"}
        | {"weight": (D, 40), "bias": (D,), "input_bias": (40,)},
    ),
    "folded_biased": (
        _reading_biased,
        {"x": "x", "gate": "row", "h": "narrow"}
        | {"weight": (D, 6), "bias": (D,), "input_bias": (6,)},
    ),
    "gated_mlp": (gated_mlp, _MLP),
    "keeping_mlp": (_keeping_mlp, _MLP),
    "folded_mlp": (gated_mlp, _NARROW_MLP),
    "keeping_folded_mlp": (_keeping_mlp, _NARROW_MLP),
}


def _inputs(name: str, dtype: torch.dtype, token_dims: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (B, *token_dims, D),
        "inner": (B, *token_dims, 40),
        "narrow": (B, *token_dims, 6),
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


@pytest.mark.parametrize("name", ["carried_linear", "modulated_linear"])
def test_detached_bias_costs_no_sum_and_leaves_the_rest(name: str, monkeypatch):
    inputs = _inputs(name, torch.float32, (T, S))
    with kernels_as(FUSED):
        expected = _run(name, inputs)
        function = OPERATIONS[name][0]
        monkeypatch.delitem(function.__globals__, "column_sum")
        inputs["bias"] = inputs["bias"].detach()
        learned = {key: x for key, x in inputs.items() if key != "bias"}
        for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            outputs = run(*inputs.values())
            generator = torch.Generator().manual_seed(1)
            incoming = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
            gradients = torch.autograd.grad(outputs, tuple(learned.values()), incoming)
            for key, gradient in zip(learned, gradients, strict=True):
                torch.testing.assert_close(gradient, expected[key], rtol=1e-6, atol=1e-6, msg=key)


def test_detached_input_bias_costs_nothing(monkeypatch):
    inputs = _inputs("gated_biased", torch.float32, (T, S))
    run = OPERATIONS["gated_biased"][0]
    monkeypatch.delitem(gated_linear.__globals__, "_input_bias_gradient")
    with kernels_as(FUSED):
        *learned, input_bias = inputs.values()
        run(*learned, input_bias.detach()).sum().backward()
        with pytest.raises(NameError, match="_input_bias_gradient"):
            run(*learned, input_bias).sum().backward()


@pytest.mark.parametrize("name", ["gated_linear", "folded_linear"])
def test_a_stream_in_float32_takes_a_layer_in_half_at_any_number_of_tokens(name: str):
    inputs = _inputs(name, torch.bfloat16, (T, S))
    inputs["x"] = inputs["x"].detach().float().requires_grad_()
    with kernels_as(FUSED):
        found = _run(name, inputs)
    assert found["output 0"].dtype == found["x"].dtype == torch.float32
    assert found["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", OPERATIONS)
def test_stream_that_nobody_else_reads_has_a_gradient(name: str):
    inputs = _inputs(name, torch.float32, (T, S))
    with kernels_as(FUSED):
        outputs = OPERATIONS[name][0](*inputs.values())
    last = outputs[-1] if isinstance(outputs, tuple) else outputs
    last.sum().backward()  # an expanded gradient, and none for the stream of the carrying ones
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs.values())


def test_compiled_product_adds_to_the_stream_in_place_unless_it_is_somebody_elses():
    """The gradient that the caller gave is still what it was; that of the outer branch is not."""
    inputs = tuple(_inputs("carried_linear", torch.float32, (T, S)).values())
    changed = []

    def twice(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        x, first = carried_linear(x, weight, bias)
        x, second = carried_linear(x * 2, weight, bias)
        return x, first + second

    def count(graph: torch.fx.GraphModule, _):
        changed.append(sum("add_product" in str(node.args) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    with kernels_as(FUSED):
        expected = twice(*inputs)
        found = torch.compile(twice, fullgraph=True, backend=aot_autograd(fw_compiler=count))(
            *inputs
        )
        incoming = [torch.randn_like(out) for out in expected]
        given = [gradient.clone() for gradient in incoming]
        right = torch.autograd.grad(expected, inputs, incoming)
        gradients = torch.autograd.grad(found, inputs, incoming)
    assert changed == [0, 2]
    assert all(a.equal(b) for a, b in zip(incoming, given, strict=True))
    for gradient, value in zip(gradients, right, strict=True):
        torch.testing.assert_close(gradient, value)


@pytest.mark.parametrize("shape", [(1, 1, D), (1, B, D), (B, T * S, D), (B, D)], ids=str)
def test_anything_but_one_row_per_sample_is_refused(shape: tuple[int, ...]):
    inputs = _inputs("modulated_linear", torch.float32, (T * S,))
    inputs["shift"] = torch.zeros(shape, device=DEVICE)
    with kernels_as(FUSED), pytest.raises(ValueError, match=r"one row per sample, \(2, 1, 24\)"):
        modulated_linear(*inputs.values())


def test_a_product_is_added_in_place_as_it_is_registered():
    operands = (torch.randn(shape, device=DEVICE) for shape in ((T, D), (T, S), (S, D)))
    torch.library.opcheck(_add_product, tuple(operands))


def test_kernels_that_cannot_run_are_refused_by_name(monkeypatch):
    monkeypatch.setattr("longtake.ops.kernels.has_triton", False)
    inputs = _inputs("carried_linear", torch.float32, (T * S,))
    with kernels_as(FUSED), pytest.raises(ValueError, match=r"Triton is not installed.*reference"):
        carried_linear(*inputs.values())
