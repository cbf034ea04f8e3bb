"""Temporal attention against explicit softmax in float64: the kernel, its operators, the choice."""

import pytest
import torch

from longtake.ops import temporal_attention as module
from longtake.ops.kernels import KernelConfig, kernels_as
from longtake.ops.temporal_attention import (
    temporal_attention,
    temporal_attention_reference,
)

pytest.importorskip("triton")
torch.set_num_threads(1)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BY_TRITON = KernelConfig(temporal_attention="triton")

# (B, T, S, A, E): every number of frames to a tile, and heads of one part or two.
SHAPES = {
    "one_frame": (2, 1, 3, 2, 72),
    "five_frames": (2, 5, 9, 2, 72),
    "sixteen_frames": (2, 16, 5, 2, 72),
    "tile_with_gaps": (1, 11, 5, 1, 72),
    "seventeen_frames": (1, 17, 3, 2, 72),
    "two_tiles": (1, 33, 2, 1, 72),
    "full_tile": (1, 64, 2, 1, 72),
    "eight_warps": (1, 100, 1, 1, 72),
    "head_of_64": (1, 16, 5, 2, 64),
    "head_of_64_with_gaps": (1, 20, 3, 2, 64),
    "head_of_40": (1, 16, 5, 2, 40),
    "head_of_32": (1, 7, 5, 2, 32),
    "head_of_12": (1, 16, 3, 3, 12),
    "odd_head": (1, 6, 3, 3, 9),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_qkv(shape, dtype=torch.bfloat16):
    return draw(*shape[:3], 3, *shape[3:]).to(DEVICE, dtype)


def draw_gradient(shape, dtype=torch.bfloat16):
    return draw(*shape, seed=1).to(DEVICE, dtype)


def by_triton(qkv):
    with kernels_as(BY_TRITON):
        return temporal_attention(qkv)


def plain_attention(qkv_BTS3AE):
    """What one writes in a few lines of torch: products in the dtype of qkv, softmax in float32."""
    q_BSATE, k_BSATE, v_BSATE = qkv_BTS3AE.permute(3, 0, 2, 4, 1, 5)
    scores_BSATT = q_BSATE @ k_BSATE.transpose(-1, -2) * q_BSATE.shape[-1] ** -0.5
    weights_BSATT = scores_BSATT.softmax(dim=-1, dtype=torch.float32).to(q_BSATE.dtype)
    return (weights_BSATT @ v_BSATE).permute(0, 3, 1, 2, 4)


def results(attend, qkv, dout):
    """Output and gradients by name."""
    qkv = qkv.detach().requires_grad_()
    out = attend(qkv)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    assert out.dtype == dqkv.dtype == qkv.dtype
    return dict(zip(("dq", "dk", "dv"), dqkv.unbind(3), strict=True)) | {"out": out.detach()}


def assert_as_exact_as_torch(qkv, dout):
    """Errors against float64 are at most twice those of plain torch in the same dtype."""
    exact = results(temporal_attention_reference, qkv.double(), dout.double())
    plain = results(plain_attention, qkv, dout)
    ours = results(by_triton, qkv, dout)
    for name, value in exact.items():
        allowed = 2 * (plain[name] - value).abs().max() + 1e-5 * value.abs().max() + 1e-6
        error = (ours[name] - value).abs().max()
        assert error <= allowed, f"{name}: {error:.2e} instead of {allowed:.2e}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_are_right(shape):
    assert_as_exact_as_torch(draw_qkv(shape), draw_gradient(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 5, 9, 1, 72), (1, 16, 5, 1, 72), (1, 17, 1, 2, 40), (1, 64, 1, 1, 128)], ids=str
)
def test_other_dtypes_are_right(shape, dtype):
    assert_as_exact_as_torch(draw_qkv(shape, dtype), draw_gradient(shape, dtype))


def test_scores_far_apart_neither_overflow_nor_vanish():
    qkv, dout = draw_qkv((1, 16, 5, 1, 72), torch.float32), draw_gradient((1, 16, 5, 1, 72))
    qkv[..., :2, :, :] *= 20  # scores of hundreds
    assert_as_exact_as_torch(qkv, dout.float())


STRIDED = {
    "wider_rows": lambda B, T, S, A, E: draw(B, T, S, 3, A, E + 24)[..., :E],
    "unaligned_rows": lambda B, T, S, A, E: draw(B, T, S, 3, A, E + 3)[..., 1 : E + 1],
    "places_before_frames": lambda B, T, S, A, E: draw(B, S, T, 3, A, E).transpose(1, 2),
    "heads_before_three": lambda B, T, S, A, E: draw(B, T, S, A, 3, E).transpose(3, 4),
    "every_other_frame": lambda B, T, S, A, E: draw(B, 2 * T, S, 3, A, E)[:, ::2],
    "one_sample_for_all": lambda B, T, S, A, E: draw(T, S, 3, A, E).expand(B, -1, -1, -1, -1, -1),
    "heads_not_dense": lambda B, T, S, A, E: draw(B, T, S, 3, E, A).transpose(4, 5),
}


@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
def test_strides_do_not_matter(strided):
    """The input is read where it lies; the results are those of a contiguous copy, bit for bit."""
    shape = (2, 5, 3, 2, 40)
    layout = strided(*shape)
    storage = layout.as_strided((layout.untyped_storage().nbytes() // 8,), (1,), 0)
    qkv = storage.to(DEVICE, torch.bfloat16).as_strided(
        layout.shape, layout.stride(), layout.storage_offset()
    )
    dout = draw_gradient(shape).transpose(1, 2).contiguous().transpose(1, 2)
    strided_results = results(by_triton, qkv, dout)
    dense_results = results(by_triton, qkv.contiguous(), dout.contiguous())
    for name, value in dense_results.items():
        assert torch.equal(strided_results[name], value), name


def test_offsets_beyond_32_bits():
    """A second frame 2^31 elements behind the first; memory that nobody touches is not taken."""
    far = torch.empty(2**31 + 3 * 32, dtype=torch.bfloat16, device=DEVICE)
    qkv = far.as_strided((1, 2, 1, 3, 1, 32), (2**31, 2**31, 96, 32, 32, 1))
    near = draw_qkv((1, 2, 1, 1, 32))
    qkv.copy_(near)
    dout = draw_gradient((1, 2, 1, 1, 32))
    for name, value in results(by_triton, near, dout).items():
        assert torch.equal(results(by_triton, qkv, dout)[name], value), name


@pytest.mark.parametrize("num_frames", [5, 16])
def test_sequences_of_a_tile_do_not_see_each_other(num_frames):
    shape = (1, num_frames, 4, 1, 32)
    qkv, dout = draw_qkv(shape), draw_gradient(shape)
    before = results(by_triton, qkv, dout)
    qkv[:, :, 1] *= -30
    dout[:, :, 1] += 100
    after = results(by_triton, qkv, dout)
    for name, value in before.items():
        assert torch.equal(value[:, :, [0, 2, 3]], after[name][:, :, [0, 2, 3]]), name
        assert not torch.equal(value[:, :, 1], after[name][:, :, 1]), name


def test_gradient_is_one_dense_tensor_and_only_the_input_is_kept():
    qkv = draw_qkv((1, 5, 3, 2, 32)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = by_triton(qkv)
    assert [x.data_ptr() for x in kept] == [qkv.data_ptr()]
    (dqkv,) = torch.autograd.grad(out.sum(), qkv)
    assert out.is_contiguous()
    assert dqkv.is_contiguous()


def test_no_places_give_nothing():
    qkv = draw_qkv((1, 5, 0, 2, 32)).requires_grad_()
    out = by_triton(qkv)
    assert out.shape == (1, 5, 0, 2, 32)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


def test_operators_keep_their_contracts():
    shape = (1, 5, 3, 2, 32)
    qkv = draw_qkv(shape, torch.float32)
    torch.library.opcheck(module._temporal_attention, (qkv.requires_grad_(),))
    arguments = (draw_gradient(shape, torch.float32), qkv.detach())
    torch.library.opcheck(module._temporal_attention_backward, arguments)


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference", "auto"])
def test_compiled_in_one_graph_it_equals_eager(backend):
    qkv, dout = draw_qkv((1, 5, 3, 2, 32)), draw_gradient((1, 5, 3, 2, 32))
    with kernels_as(KernelConfig(temporal_attention=backend)):
        eager = results(temporal_attention, qkv, dout)
        torch.compiler.reset()
        compiled = torch.compile(temporal_attention, fullgraph=True, backend="aot_eager")
        for name, value in results(compiled, qkv, dout).items():
            assert torch.equal(value, eager[name]), name


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_other_backends_agree(backend, dtype):
    shape = (2, 5, 3, 2, 8)
    qkv, dout = draw_qkv(shape, dtype), draw_gradient(shape, dtype)
    exact = results(temporal_attention_reference, qkv.double(), dout.double())
    rtol, atol = (0.02, 0.05) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    with kernels_as(KernelConfig(temporal_attention=backend)):
        found = results(temporal_attention, qkv, dout)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value.to(dtype), rtol=rtol, atol=atol)
    assert found["out"].is_contiguous()


def test_reference_is_softmax_attention_at_every_place():
    qkv = draw(2, 4, 3, 3, 2, 8)
    out = temporal_attention_reference(qkv)
    for b, s, a in ((0, 0, 0), (1, 2, 1)):
        q, k, v = qkv[b, :, s, :, a].unbind(1)
        weights = (q @ k.T / 8**0.5).softmax(-1)
        torch.testing.assert_close(out[b, :, s, a], weights @ v)


def test_other_layouts_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 4, 3, 48\), but expects .* unflatten the la"):
        temporal_attention(torch.zeros(2, 4, 3, 48))
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 2, 3, 8\), but expects \(batch, frames, pl"):
        temporal_attention(torch.zeros(2, 4, 3, 2, 3, 8))


REFUSED = {
    "too_many_frames": ((1, 129, 1, 1, 8), torch.bfloat16, "at most 128 frames of bfloat16, not 1"),
    "float32_frames": ((1, 65, 1, 1, 8), torch.float32, "at most 64 frames of float32, not 65"),
    "dtype": ((1, 4, 1, 1, 8), torch.float64, "bfloat16, float16 or float32, not float64"),
    "head": ((1, 4, 1, 1, 136), torch.bfloat16, "heads up to 128, not 136"),
}


@pytest.mark.parametrize(("shape", "dtype", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_cannot_do_is_refused(shape, dtype, message):
    with pytest.raises(ValueError, match=f'"triton" cannot run here: .*{message}'):
        by_triton(draw_qkv(shape, dtype))


def test_a_processor_without_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        by_triton(torch.zeros(1, 4, 1, 3, 1, 8))
