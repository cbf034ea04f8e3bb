"""qk_norm_rotary against float64: output and the gradients of qkv and of both weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from longtake.ops import qk_norm_rotary as module
from longtake.ops import qk_norm_rotary_kernel
from longtake.ops.kernels import KernelConfig, kernels_as
from longtake.ops.qk_norm_rotary import qk_norm_rotary, qk_norm_rotary_reference
from longtake.ops.sincos import sincos

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = KernelConfig(elementwise="triton")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def inputs(B: int, T: int, S: int, A: int, E: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of values that dtype can hold; heads differ in size by the thousandfold."""
    sizes_A11 = 10.0 ** (torch.arange(A) % 4 - 2)[:, None]
    qkv = (draw(B, T, S, 3, A, E, seed=0, dtype=torch.float32) * sizes_A11.to(DEVICE)).to(dtype)
    return {
        "qkv": qkv,
        "q_weight": 1 + draw(E, seed=1, dtype=dtype) / 2,
        "k_weight": 1 - draw(E, seed=2, dtype=dtype) / 2,
    }


def angles(T: int, E: int) -> tuple[Tensor, Tensor]:
    """Views into one table, as the model makes them; not the first places, where little turns."""
    places = torch.arange(7, 7 + T, dtype=torch.float64, device=DEVICE)
    sin_TF, cos_TF = sincos(places, E // 2).chunk(2, dim=1)
    return sin_TF, cos_TF


def run(op, tensors: dict[str, Tensor], sin_cos: tuple, dout: Tensor) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = op(*leaves.values(), *sin_cos)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout)
    named = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    results = {"out": out.detach(), "dqkv": named.pop("dqkv")}
    parts = {
        f"{name} of {part}": results[name].select(-3, i)
        for name in results
        for i, part in enumerate("qkv")
    }
    return parts | named


def check(tensors: dict[str, Tensor], sin_cos: tuple, dout: Tensor) -> None:
    """The kernels' errors are at most twice those of plain torch in the same dtype."""
    with kernels_as(TRITON):
        found = run(qk_norm_rotary, tensors, sin_cos, dout)
    usual = run(qk_norm_rotary_reference, tensors, sin_cos, dout)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    true = run(qk_norm_rotary_reference, exact, sin_cos, dout.double())
    assert found.keys() == true.keys()
    for name, value in found.items():
        assert value.dtype == usual[name].dtype, name
        assert value.shape == usual[name].shape, name
        error = (value.double() - true[name]).abs().max()
        scale = true[name].abs().max()
        allowed = 2 * (usual[name].double() - true[name]).abs().max() + 1e-6 * scale
        assert error <= allowed, f"{name}: {error} > {allowed}"
    for name in ("out of v", "dqkv of v"):
        assert torch.equal(found[name], usual[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "T", "S", "A", "E"),
    [
        (1, 16, 2, 16, 72),  # the heads of XL; a tile of rows lies in one frame
        (2, 5, 3, 3, 72),  # tiles that span frames and samples, and a last one that is not full
        (1, 17, 2, 6, 64),
        (2, 1, 9, 4, 32),
        (1, 4, 5, 2, 40),
        (1, 3, 1, 1, 2),
    ],
    ids=lambda size: str(size),
)
@pytest.mark.parametrize("turned", [True, False], ids=["turned", "norm"])
def test_results_and_gradients(
    B: int, T: int, S: int, A: int, E: int, dtype: torch.dtype, turned: bool
):
    tensors = inputs(B, T, S, A, E, dtype)
    dout = draw(*tensors["qkv"].shape, seed=3, dtype=dtype)
    check(tensors, angles(T, E) if turned else (None, None), dout)


@pytest.mark.parametrize("shape", [(7, 3, 2, 72), (2, 11, 3, 4, 64), (2, 2, 2, 5, 3, 2, 32)])
def test_tokens_may_have_any_number_of_dimensions(shape: tuple[int, ...]):
    qkv = draw(*shape, seed=0, dtype=torch.float32)
    weights = {name: draw(shape[-1], seed=1, dtype=torch.float32) for name in ("q", "k")}
    dout = draw(*shape, seed=3, dtype=torch.float32)
    check({"qkv": qkv, **weights}, (None, None), dout)


def test_strided_inputs():
    """Tokens in another order in memory, a broadcast gradient, weights and angles apart."""
    wide = draw(4, 2, 6, 3, 2, 2 * 32, seed=0, dtype=torch.float32)
    qkv = wide.transpose(0, 1)[..., 5 : 5 + 32]
    weights = {
        name: draw(32, 3, seed=seed, dtype=torch.float32)[:, 1]
        for seed, name in ((1, "q_weight"), (2, "k_weight"))
    }
    dout = draw(1, 1, 1, 3, 2, 32, seed=3, dtype=torch.float32).expand(qkv.shape)
    sin_TF, cos_TF = angles(4, 32)
    apart = sin_TF.T.contiguous().T, cos_TF.contiguous()
    assert apart[0].stride() != apart[1].stride()
    check({"qkv": qkv, **weights}, apart, dout)


def test_weights_in_float32_beside_bfloat16_tokens():
    """Plain torch does not take these together in its fused norm, so against float64 alone."""
    tensors = inputs(1, 4, 2, 2, 64, torch.bfloat16)
    tensors |= {name: tensors[name].float() for name in ("q_weight", "k_weight")}
    dout = draw(*tensors["qkv"].shape, seed=3, dtype=torch.bfloat16)
    with kernels_as(TRITON):
        found = run(qk_norm_rotary, tensors, angles(4, 64), dout)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    true = run(qk_norm_rotary_reference, exact, angles(4, 64), dout.double())
    for name, value in found.items():
        assert value.dtype == (torch.float32 if "weight" in name else torch.bfloat16), name
        relative = 1e-5 if "weight" in name else 2**-8
        assert (value.double() - true[name]).abs().max() <= relative * true[name].abs().max(), name


def test_a_row_of_zeros_stays_zero_and_spoils_no_gradient():
    tensors = inputs(1, 4, 2, 2, 32, torch.float32)
    tensors["qkv"][0, 1, 1] = 0
    dout = draw(*tensors["qkv"].shape, seed=3, dtype=torch.float32)
    check(tensors, angles(4, 32), dout)
    with kernels_as(TRITON):
        out = qk_norm_rotary(*tensors.values(), *angles(4, 32))
    assert (out[0, 1, 1] == 0).all()


def test_many_tiles_for_each_program_of_the_backward(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(qk_norm_rotary_kernel, "BACKWARD_PROGRAMS", 3)
    tensors = inputs(2, 5, 7, 4, 32, torch.float32)
    dout = draw(*tensors["qkv"].shape, seed=3, dtype=torch.float32)
    check(tensors, angles(5, 32), dout)


def test_no_tokens():
    tensors = inputs(2, 0, 3, 2, 32, torch.float32)
    with kernels_as(TRITON):
        found = run(qk_norm_rotary, tensors, angles(0, 32), torch.empty_like(tensors["qkv"]))
    assert found["out of q"].shape == (2, 0, 3, 2, 32)
    assert (found["dq_weight"] == 0).all()


def test_same_bits_every_time():
    tensors = inputs(1, 16, 5, 4, 72, torch.bfloat16)
    dout = draw(*tensors["qkv"].shape, seed=3, dtype=torch.bfloat16)
    with kernels_as(TRITON):
        first, second = (run(qk_norm_rotary, tensors, angles(16, 72), dout) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_float64_is_not_quietly_rounded():
    tensors = inputs(1, 2, 1, 1, 4, torch.float64)
    assert qk_norm_rotary(*tensors.values()).dtype == torch.float64
    with kernels_as(TRITON), pytest.raises(ValueError, match=r"qkv is torch\.float64"):
        qk_norm_rotary(*tensors.values())


@pytest.mark.parametrize("turned", [True, False], ids=["turned", "norm"])
def test_tracing_sees_what_runs(turned: bool):
    tensors = inputs(1, 4, 2, 2, 32, torch.float32)
    sin_cos = angles(4, 32) if turned else (None, None)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    torch.library.opcheck(module._forward, (*leaves, *sin_cos, 1e-6))
    detached = [tensor.detach() for tensor in leaves]
    torch.library.opcheck(module._backward, (detached[0], *detached, *sin_cos, 1e-6))


def test_compiled_equals_eager():
    tensors = inputs(1, 4, 2, 2, 32, torch.bfloat16)
    dout = draw(*tensors["qkv"].shape, seed=3, dtype=torch.bfloat16)
    with kernels_as(TRITON):
        compiled = torch.compile(qk_norm_rotary, fullgraph=True, backend="aot_eager")
        found = run(compiled, tensors, angles(4, 32), dout)
        eager = run(qk_norm_rotary, tensors, angles(4, 32), dout)
    for name in eager:
        assert torch.equal(found[name], eager[name]), name
