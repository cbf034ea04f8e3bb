"""gelu's kernels against plain torch and float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.ops import gelu as module
from longtake.ops.gelu import gelu, gelu_backward, gelu_forward, gelu_reference
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
# In the interpreter numpy warns of the infinite exponential, which is meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
torch.set_num_threads(1)

# One block of columns, several, and rows and columns that end within a tile.
SHAPES = {"one value": (1, 1), "odd": (7, 13), "blocks": (9, 1152), "tokens": (2, 3, 5, 40)}


def _exact_gradient(dact: Tensor, pre: Tensor) -> Tensor:
    leaf = pre.double().requires_grad_()
    return torch.autograd.grad(gelu_reference(leaf), leaf, dact.double())[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_is_as_exact_as_plain(shape: tuple[int, ...], dtype: torch.dtype):
    assert_as_exact_as_plain(gelu, {"x": draw(*shape, dtype=dtype) * 2})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_any_size_are_right(dtype: torch.dtype):
    largest = torch.tensor([-60000.0, -300, -40, 40, 300, 60000, 0, -0.0, 1e-6, -1e-6])
    x = torch.cat((torch.linspace(-12, 12, 999), largest)).to(DEVICE, dtype)
    assert_as_exact_as_plain(gelu, {"x": x})
    dact = draw(1, len(x), dtype=dtype)
    dpre, act, _ = gelu_backward(dact, x[None], True)
    assert dpre.isfinite().all()
    assert act.isfinite().all()


def test_where_the_gelu_is_small_it_keeps_its_digits():
    x = torch.linspace(-5.5, -1, 200, device=DEVICE)[None]
    exact = gelu_reference(x.double())
    relative = (gelu_forward(x).double() / exact - 1).abs().max()
    assert relative < 1e-5  # 1 + tanh in float32 is 30 % wrong at -5 and zero at -5.5


def test_strided_values():
    x = draw(20, 7).t()
    assert not x.is_contiguous()
    assert_as_exact_as_plain(gelu, {"x": x})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("programs", [1, 3072])
def test_backward_gives_gradient_output_and_column_sums(
    programs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "BACKWARD_PROGRAMS", programs)
    dact, pre = (draw(19, 300, dtype=dtype, seed=seed) for seed in (0, 1))
    dpre, act, dbias = gelu_backward(dact, pre, True)
    exact_dpre = _exact_gradient(dact, pre)
    assert dpre.dtype == act.dtype == dtype
    assert dbias.dtype == torch.float32
    assert_close(dpre, exact_dpre)
    assert_close(act, gelu_reference(pre.double()))
    assert_close(dbias, exact_dpre.sum(0))

    lean = gelu_backward(dact, pre, False)
    assert lean[0].equal(dpre)
    assert lean[1].numel() == 0
    assert lean[2].equal(dbias)


def test_no_rows_give_zero_sums():
    nothing = draw(0, 40)
    assert gelu_forward(nothing).shape == (0, 40)
    dpre, _, dbias = gelu_backward(nothing, nothing, False)
    assert dpre.shape == (0, 40)
    assert dbias.equal(torch.zeros(40, device=DEVICE))


@pytest.mark.parametrize("with_output", [False, True])
def test_custom_operations_are_what_they_are_registered_as(with_output: bool):
    dact, pre = (draw(5, 12, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    torch.library.opcheck(module._forward, (pre,))
    torch.library.opcheck(module._backward, (dact, pre, with_output))


def test_compiled_whole_equals_eager():
    assert_compiled_equals_eager(gelu, {"x": draw(2, 3, 24, dtype=torch.bfloat16)})


def test_float64_is_refused_by_the_kernels_when_asked_for():
    with kernels_as(TRITON), pytest.raises(ValueError, match=r"pre is torch.float64.*reference"):
        gelu(draw(2, 3, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="4.8 GB per tensor, and the interpreter is slow")
def test_more_than_two_to_the_31_values():
    rows = 2**31 // 4608 + 5
    pre = torch.randn(rows, 4608, device=DEVICE, dtype=torch.bfloat16)
    assert gelu_forward(pre)[-9:].equal(gelu_forward(pre[-9:]))
    dpre, act, _ = gelu_backward(pre, pre, True)
    last_dpre, last_act, _ = gelu_backward(pre[-9:], pre[-9:], True)
    assert dpre[-9:].equal(last_dpre)
    assert act[-9:].equal(last_act)
