"""An operation registered without `custom_op` still is what PyTorch takes it for."""

import importlib

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from longtake.ops.operation import operation, register_autograd, register_fake

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@operation("longtake_test::scaled")
def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


@register_fake(scaled)
def _(x: Tensor, factor: float) -> Tensor:
    return x.new_empty(x.shape)


def save_factor(ctx, inputs, output):
    ctx.factor = inputs[1]


register_autograd(scaled, lambda ctx, dy: (dy * ctx.factor, None), setup_context=save_factor)


@operation("longtake_test::add_one", mutates_args=("x",))
def add_one(x: Tensor) -> None:
    x.numpy()[:] += 1  # unseen by PyTorch, like a kernel's writes


@operation("longtake_test::without_gradient")
def without_gradient(x: Tensor) -> Tensor:
    return x * 2


def test_operations_are_what_they_are_registered_as():
    torch.library.opcheck(scaled, (torch.randn(3, requires_grad=True), 2.0))
    torch.library.opcheck(add_one, (torch.randn(3),))


def test_it_is_the_operation_itself_that_is_called():
    assert scaled is torch.ops.longtake_test.scaled.default
    assert str(scaled._schema) == "longtake_test::scaled(Tensor x, float factor) -> Tensor"


def test_a_change_of_what_a_backward_needs_is_told():
    x = torch.ones(3, requires_grad=True)
    y = x.exp()  # needs its result
    with torch.no_grad():
        add_one(y.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_tensors_of_inference_mode_may_be_changed():
    with torch.inference_mode():
        x = torch.zeros(3)
        add_one(x)
    assert x.equal(torch.ones(3))


def test_an_operation_that_returns_nothing_is_not_run_without_data():
    with FakeTensorMode():
        add_one(torch.zeros(3))
    add_one(torch.zeros(3, device="meta"))


def test_an_exported_program_calls_it():
    class Scale(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scaled(x, 3.0)

    program = torch.export.export(Scale(), (torch.ones(2),))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [scaled]
    assert program.module()(torch.ones(2)).equal(torch.full((2,), 3.0))


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "in a frame left to Python"])
def test_compiled_code_calls_it_and_does_not_look_inside(is_whole: bool):
    traced = []

    def backend(graph: torch.fx.GraphModule, _):
        traced.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def scale(x: Tensor) -> Tensor:
        for _ in range(1):
            if not is_whole:  # in a loop it makes torch.compile leave the frame alone
                torch._dynamo.graph_break()
            x = scaled(x, 3.0)
        return x

    compiled = torch.compile(scale, backend=backend, fullgraph=is_whole)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
    assert traced == ([scaled] if is_whole else [])


def test_a_gradient_that_is_not_registered_is_told():
    y = without_gradient(torch.ones(2, requires_grad=True))
    with pytest.warns(UserWarning, match="longtake_test::without_gradient.*was not registered"):
        y.sum().backward()


def test_a_module_may_be_imported_twice():
    gelu = importlib.import_module("longtake.ops.gelu")
    before = gelu._forward
    importlib.reload(gelu)
    assert gelu._forward is torch.ops.longtake.gelu_forward.default is not before
    torch.library.opcheck(gelu._forward, (torch.randn(4, 8, device=DEVICE),))
