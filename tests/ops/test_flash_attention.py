"""Flash attention against explicit softmax in float64: the kernels, their operators, the choice."""

import pytest
import torch

from longtake.ops import flash_attention as module
from longtake.ops.attention import self_attention
from longtake.ops.flash_attention import Tiles, flash_attention, flash_attention_reference
from longtake.ops.kernels import KernelConfig, kernels_as

pytest.importorskip("triton")
torch.set_num_threads(1)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (B, N, A, E): tiles that N fills exactly, in part, or several times; heads of one part or two.
SHAPES = {
    "one_token": (2, 1, 2, 72),
    "five_tokens": (1, 5, 2, 72),
    "small_tile": (1, 64, 2, 72),
    "small_tile_in_part": (2, 33, 1, 72),
    "one_query_tile": (1, 128, 1, 72),
    "several_tiles": (1, 256, 1, 72),
    "tiles_in_part": (1, 200, 1, 72),
    "one_more_than_tiles": (2, 129, 1, 72),
    "keys_fill_their_tiles": (1, 192, 1, 72),
    "head_of_64": (1, 100, 2, 64),
    "head_of_40": (1, 70, 2, 40),
    "head_of_32": (2, 65, 2, 32),
    "head_of_128": (1, 130, 1, 128),
    "head_of_12": (1, 17, 3, 12),
    "odd_head": (1, 70, 3, 19),
}


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_qkv(shape, dtype=torch.bfloat16):
    B, N, A, E = shape
    return draw(B, N, 3, A, E).to(DEVICE, dtype)


def draw_gradient(shape, dtype=torch.bfloat16):
    return draw(*shape, seed=1).to(DEVICE, dtype)


def plain_attention(qkv_BN3AE):
    """What one writes in a few lines of torch: products in the dtype of qkv, softmax in float32."""
    q_BANE, k_BANE, v_BANE = qkv_BN3AE.permute(2, 0, 3, 1, 4)
    scores_BANN = q_BANE @ k_BANE.transpose(-1, -2) * q_BANE.shape[-1] ** -0.5
    weights_BANN = scores_BANN.softmax(dim=-1, dtype=torch.float32).to(q_BANE.dtype)
    return (weights_BANN @ v_BANE).transpose(1, 2)


def results(attend, qkv, dout):
    """Output and gradients by name."""
    qkv = qkv.detach().requires_grad_()
    out = attend(qkv)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    assert out.dtype == dqkv.dtype == qkv.dtype
    return dict(zip(("dq", "dk", "dv"), dqkv.unbind(2), strict=True)) | {"out": out.detach()}


def assert_as_exact_as_torch(qkv, dout, attend=flash_attention, slack=0.0):
    """Errors against float64 are at most twice those of plain torch in the same dtype, and slack
    relative to the largest value."""
    exact = results(flash_attention_reference, qkv.double(), dout.double())
    plain = results(plain_attention, qkv, dout)
    ours = results(attend, qkv, dout)
    for name, value in exact.items():
        allowed = 2 * (plain[name] - value).abs().max() + (1e-5 + slack) * value.abs().max() + 1e-6
        error = (ours[name] - value).abs().max()
        assert error <= allowed, f"{name}: {error:.2e} instead of {allowed:.2e}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_are_right(shape):
    assert_as_exact_as_torch(draw_qkv(shape), draw_gradient(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 37, 1, 72), (1, 64, 1, 72), (1, 35, 2, 40)], ids=str)
def test_other_dtypes_are_right(shape, dtype):
    assert_as_exact_as_torch(draw_qkv(shape, dtype), draw_gradient(shape, dtype))


# What comes of absent keys may overflow; it is not stored.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("sign", [1, -1], ids=["high", "low"])
def test_scores_far_from_zero_neither_overflow_nor_vanish(sign):
    """Keys that are not there would have a score of zero: far above, or far below the others."""
    shape = (1, 100, 1, 72)
    qkv, dout = draw_qkv(shape, torch.float32), draw_gradient(shape, torch.float32)
    qkv[:, :, 0] = qkv[:, :, 0].abs() * 20
    qkv[:, :, 1] = qkv[:, :, 1].abs() * sign * 20
    # The backward finds weights again from logarithms of about 3000, kept in float32.
    assert_as_exact_as_torch(qkv, dout, slack=3000 * torch.finfo(torch.float32).eps)


TILES = {
    "equal": Tiles(queries=64, keys=64, num_warps=4, num_stages=1),
    "more_keys": Tiles(queries=32, keys=128, num_warps=4, num_stages=2),
    "more_queries": Tiles(queries=128, keys=32, num_warps=8, num_stages=3),
}


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("num_tokens", [128, 150], ids=["even", "odd"])
def test_any_tiles_are_right(num_tokens, tiles, monkeypatch):
    """Those that are not the default must be right too, before anyone times them."""
    for name in ("forward_tiles", "query_gradient_tiles", "key_value_gradient_tiles"):
        monkeypatch.setattr(module, name, lambda *args: tiles)
    shape = (1, num_tokens, 1, 72)
    assert_as_exact_as_torch(draw_qkv(shape), draw_gradient(shape))


def test_log_sum_of_each_row():
    qkv = draw_qkv((2, 70, 2, 40))
    _, lse = module.launch_forward(qkv)
    q, k, _ = qkv.double().unbind(2)
    exact = torch.logsumexp(torch.einsum("bnae,bmae->banm", q, k) * 40**-0.5, dim=-1)
    found = lse[..., :70].double()
    torch.testing.assert_close(found, exact * 1.4426950408889634, rtol=1e-5, atol=1e-5)
    assert (lse[..., 70:] == float("inf")).all()


STRIDED = {
    "wider_rows": lambda B, N, A, E: draw(B, N, 3, A, E + 24)[..., :E],
    "unaligned_rows": lambda B, N, A, E: draw(B, N, 3, A, E + 3)[..., 1 : E + 1],
    "tokens_before_samples": lambda B, N, A, E: draw(N, B, 3, A, E).transpose(0, 1),
    "heads_before_three": lambda B, N, A, E: draw(B, N, A, 3, E).transpose(2, 3),
    "three_first": lambda B, N, A, E: draw(3, B, N, A, E).permute(1, 2, 0, 3, 4),
    "one_sample_for_all": lambda B, N, A, E: draw(N, 3, A, E).expand(B, -1, -1, -1, -1),
    "heads_not_dense": lambda B, N, A, E: draw(B, N, 3, E, A).transpose(3, 4),
}


@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
def test_strides_do_not_matter(strided):
    """The input is read where it lies; the results are those of a contiguous copy, bit for bit."""
    shape = (2, 20, 2, 40)
    layout = strided(*shape)
    storage = layout.as_strided((layout.untyped_storage().nbytes() // 8,), (1,), 0)
    qkv = storage.to(DEVICE, torch.bfloat16).as_strided(
        layout.shape, layout.stride(), layout.storage_offset()
    )
    dout = draw_gradient(shape).transpose(1, 2).contiguous().transpose(1, 2)
    strided_results = results(flash_attention, qkv, dout)
    dense_results = results(flash_attention, qkv.contiguous(), dout.contiguous())
    for name, value in dense_results.items():
        assert torch.equal(strided_results[name], value), name


def test_samples_and_heads_do_not_see_each_other():
    shape = (2, 70, 2, 40)
    qkv, dout = draw_qkv(shape), draw_gradient(shape)
    before = results(flash_attention, qkv, dout)
    qkv[1, :, :, 0] *= -30
    dout[1, :, 0] += 100
    after = results(flash_attention, qkv, dout)
    for name, value in before.items():
        assert torch.equal(value[0], after[name][0]), name
        assert torch.equal(value[1, :, 1], after[name][1, :, 1]), name
        assert not torch.equal(value[1, :, 0], after[name][1, :, 0]), name


def test_every_element_is_written(monkeypatch):
    """Memory that comes back from earlier use holds anything."""
    shape = (2, 70, 1, 72)
    qkv, dout = draw_qkv(shape), draw_gradient(shape)
    before = results(flash_attention, qkv, dout)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(float("nan")),
    )
    for name, value in results(flash_attention, qkv, dout).items():
        assert torch.equal(value, before[name]), name


def test_gradient_is_one_dense_tensor():
    qkv = draw_qkv((1, 5, 2, 32)).requires_grad_()
    out = flash_attention(qkv)
    (dqkv,) = torch.autograd.grad(out.sum(), qkv)
    assert out.is_contiguous()
    assert dqkv.is_contiguous()


def test_no_samples_give_nothing():
    qkv = draw_qkv((0, 5, 2, 32)).requires_grad_()
    out = flash_attention(qkv)
    assert out.shape == (0, 5, 2, 32)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


def test_operators_keep_their_contracts():
    shape = (1, 5, 2, 32)
    qkv = draw_qkv(shape, torch.float32)
    torch.library.opcheck(module._flash_attention, (qkv.requires_grad_(),))
    out, lse = module.launch_forward(qkv.detach())
    arguments = (draw_gradient(shape, torch.float32), qkv.detach(), out, lse)
    torch.library.opcheck(module._flash_attention_backward, arguments)


def test_compiled_in_one_graph_it_equals_eager():
    qkv, dout = draw_qkv((1, 5, 2, 32)), draw_gradient((1, 5, 2, 32))
    eager = results(flash_attention, qkv, dout)
    torch.compiler.reset()
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")
    for name, value in results(compiled, qkv, dout).items():
        assert torch.equal(value, eager[name]), name


def test_self_attention_takes_it_when_asked():
    qkv, dout = draw_qkv((1, 5, 2, 32)), draw_gradient((1, 5, 2, 32))
    direct = results(flash_attention, qkv, dout)
    with kernels_as(KernelConfig(self_attention="triton")):
        chosen = results(self_attention, qkv, dout)
    for name, value in direct.items():
        assert torch.equal(value, chosen[name]), name


def test_other_layouts_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 4, 48\), but expects .* unflatten the last"):
        flash_attention(torch.zeros(2, 4, 48))
    with pytest.raises(ValueError, match=r"\(2, 4, 2, 3, 8\), but expects \(batch, tokens, 3, h"):
        flash_attention(torch.zeros(2, 4, 2, 3, 8))


REFUSED = {
    "dtype": ((1, 4, 1, 8), torch.float64, "bfloat16, float16 or float32, not float64"),
    "head": ((1, 4, 1, 136), torch.bfloat16, "heads up to 128, not 136"),
}


@pytest.mark.parametrize(("shape", "dtype", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernels_cannot_do_is_refused(shape, dtype, message):
    with pytest.raises(ValueError, match=f'"triton" cannot run here: .*{message}'):
        flash_attention(draw_qkv(shape, dtype))


def test_a_processor_without_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        flash_attention(torch.zeros(1, 4, 3, 1, 8))
