"""text_attention against float64: output and gradients of q, keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from longtake.ops import text_attention_kernel
from longtake.ops.kernels import KernelConfig, kernels_as
from longtake.ops.text_attention import text_attention, text_attention_reference

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = KernelConfig(cross_attention="triton")


def random_inputs(
    B: int, N: int, A: int, E: int, L: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, kv, dout), of values that dtype can hold."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    return draw(B, N, A, E), draw(B, L, 2, A, E), draw(B, N, A, E)


def mask_of(kind: str, L: int) -> Tensor | None:
    """(2, L): two captions' valid tokens."""
    if kind == "no_mask":
        return None
    position = torch.arange(L, device=DEVICE)
    second = {
        "ragged": position < (L + 1) // 2,
        "one_empty": position < 0,
        "holes": position % 3 == 1,
    }[kind]
    return torch.stack([position < L, second] if kind != "holes" else [~second, second])


def plain(q_BNAE: Tensor, kv_BL2AE: Tensor, key_mask_BL: Tensor | None) -> Tensor:
    """What one writes in plain torch: every step in the dtype of q."""
    k_BLAE, v_BLAE = kv_BL2AE.unbind(2)
    scores_BANL = torch.einsum("bnae,blae->banl", q_BNAE, k_BLAE) * q_BNAE.shape[-1] ** -0.5
    if key_mask_BL is not None:
        is_seen_BL = key_mask_BL | ~key_mask_BL.any(dim=1, keepdim=True)
        v_BLAE = v_BLAE * key_mask_BL.any(dim=1)[:, None, None, None]
        scores_BANL = scores_BANL.masked_fill(~is_seen_BL[:, None, None], float("-inf"))
    return torch.einsum("banl,blae->bnae", scores_BANL.softmax(dim=-1), v_BLAE)


def run(op, q: Tensor, kv: Tensor, mask: Tensor | None, dout: Tensor) -> dict[str, Tensor]:
    q, kv = q.detach().requires_grad_(), kv.detach().requires_grad_()
    out = op(q, kv, mask)
    dq, dkv = torch.autograd.grad(out, (q, kv), dout)
    return {"out": out.detach(), "dq": dq, "dk": dkv[:, :, 0], "dv": dkv[:, :, 1]}


def check(q: Tensor, kv: Tensor, mask: Tensor | None, dout: Tensor) -> None:
    """The kernels' errors are at most twice those of plain torch in the same dtype."""
    with kernels_as(TRITON):
        found = run(text_attention, q, kv, mask, dout)
    usual = run(plain, q, kv, mask, dout)
    true = run(text_attention_reference, q.double(), kv.double(), mask, dout.double())
    for name, value in found.items():
        assert value.dtype == q.dtype, name
        error = (value.double() - true[name]).abs().max()
        # The slack is float32's, for what plain torch happens to get exactly.
        allowed = 2 * (usual[name].double() - true[name]).abs().max() + 1e-5
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("N", "L", "A", "E", "mask"),
    [
        (130, 120, 1, 72, "ragged"),
        (33, 7, 3, 64, "holes"),
        (33, 7, 2, 72, "one_empty"),
        (1, 1, 2, 32, "no_mask"),
        (40, 130, 1, 40, "holes"),
        (17, 256, 1, 72, "no_mask"),
    ],
)
def test_kernels_are_as_exact_as_plain_torch(N, L, A, E, mask, dtype):
    q, kv, dout = random_inputs(2, N, A, E, L, dtype)
    check(q, kv, mask_of(mask, L), dout)


@pytest.mark.parametrize("num_sms", [1, 8])
@pytest.mark.parametrize("L", [20, 130])
def test_programs_that_share_the_queries_lose_none(monkeypatch, num_sms, L):
    # One multiprocessor: a program takes all 4 blocks; eight: two programs take 2 each.
    monkeypatch.setattr(text_attention_kernel, "_num_sms", lambda device: num_sms)
    q, kv, dout = random_inputs(2, 200, 2, 16, L, torch.bfloat16)
    check(q, kv, mask_of("ragged", L), dout)


@pytest.mark.parametrize(
    ("rows", "blocks", "slots", "splits"),
    [(16, 1024, 132, 8), (16, 1024, 396, 24), (256, 64, 132, 1), (32, 1, 132, 1), (1, 9, 132, 9)],
)
def test_queries_are_split_so_that_all_programs_end_at_once(rows, blocks, slots, splits):
    assert text_attention_kernel._best_splits(rows, blocks, slots) == splits


def test_strided_inputs_equal_contiguous_ones():
    q, kv, dout = random_inputs(2, 33, 2, 72, 7, torch.float16)
    mask = mask_of("ragged", 7)
    assert mask is not None
    packed_q = torch.stack([dout, q], dim=2)[:, :, 1]
    wide_kv = torch.cat([kv, kv], dim=-1)[..., :72]
    turned_dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    spread_q = q.repeat_interleave(2, dim=-1)[..., ::2]
    turned_mask = mask.T.contiguous().T
    strided = (packed_q, wide_kv, turned_dout, spread_q, turned_mask)
    assert not any(x.is_contiguous() for x in strided)
    with kernels_as(TRITON):
        expected = run(text_attention, q, kv, mask, dout)
        for strided_q in (packed_q, spread_q):
            found = run(text_attention, strided_q, wide_kv, turned_mask, turned_dout)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_outputs_and_gradients_are_contiguous():
    q, kv, _ = random_inputs(2, 5, 2, 32, 7, torch.float32)
    for backend in ("triton", "sdpa", "reference"):
        with kernels_as(KernelConfig(cross_attention=backend)):
            assert text_attention(q, kv, mask_of("ragged", 7)).is_contiguous()
    q, kv = q.requires_grad_(), kv.requires_grad_()
    with kernels_as(TRITON):
        out = text_attention(q, kv)
    # The gradient of a sum has a stride of zero.
    assert all(x.is_contiguous() for x in torch.autograd.grad(out.sum(), (q, kv)))


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_valid_key_gives_zeros_and_no_nan(backend, dtype):
    q, kv, dout = random_inputs(2, 5, 2, 72, 7, dtype)
    kv[1, :, 1] = float("inf")
    with kernels_as(KernelConfig(cross_attention=backend)):
        found = run(text_attention, q, kv, mask_of("one_empty", 7), dout)
    for name, value in found.items():
        assert value.isfinite().all(), name
        assert (value[1] == 0).all(), name
        assert (value[0] != 0).any(), name


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("mask", ["no_mask", "ragged", "one_empty", "holes"])
def test_masked_keys_are_as_if_absent(backend, mask):
    q, kv, dout = random_inputs(2, 5, 2, 8, 7)
    mask_BL = mask_of(mask, 7)
    with kernels_as(KernelConfig(cross_attention=backend)):
        found = run(text_attention, q, kv, mask_BL, dout)
    for b in range(2):
        is_valid = slice(None) if mask_BL is None else mask_BL[b]
        alone = run(plain, q[b : b + 1], kv[b : b + 1, is_valid], None, dout[b : b + 1])
        torch.testing.assert_close(found["out"][b], alone["out"][0])
        torch.testing.assert_close(found["dq"][b], alone["dq"][0])
        torch.testing.assert_close(found["dv"][b, is_valid], alone["dv"][0])
        torch.testing.assert_close(found["dk"][b, is_valid], alone["dk"][0])


def test_scores_far_from_zero_neither_overflow_nor_vanish():
    q, kv, dout = random_inputs(2, 5, 2, 32, 7, torch.float32)
    mask = mask_of("ragged", 7)
    # Scores near 0, of about 1000 either way, and all near -500: the exponentials of these are zero
    # unless the highest is taken off.
    low = torch.cat([-9 - kv[:, :, :1] / 50, kv[:, :, 1:]], dim=2)
    for queries, keys in ((q / 100, kv), (14 * q, 14 * kv), (9 * torch.ones_like(q), low)):
        with kernels_as(TRITON):
            found = run(text_attention, queries, keys, mask, dout)
        true = run(text_attention_reference, queries.double(), keys.double(), mask, dout.double())
        for name, value in found.items():
            # Gradients of q and k cancel where one key takes all: compare with what cancels.
            size = {"dq": keys[:, :, 0], "dk": queries}.get(name, dout).abs().max()
            error = (value - true[name]).abs().max() / (size * keys.abs().max())
            assert error < 1e-3, f"{name}: {error}"


def test_operators_are_well_registered():
    q, kv, dout = random_inputs(2, 5, 2, 32, 7, torch.float32)
    mask = mask_of("ragged", 7)
    assert mask is not None
    ops = torch.ops.longtake
    _, lse = ops.text_attention(q, kv, mask)
    scores = torch.einsum("bnae,blae->banl", q, kv[:, :, 0]) * 32**-0.5
    scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1))
    q, kv = q.requires_grad_(), kv.requires_grad_()
    torch.library.opcheck(ops.text_attention.default, (q, kv, mask))
    # The rest is the same without a mask.
    torch.library.opcheck(
        ops.text_attention.default, (q, kv, None), test_utils=("test_schema", "test_faketensor")
    )
    arguments = (dout, q.detach(), kv.detach(), mask, lse)
    torch.library.opcheck(ops.text_attention_backward.default, arguments)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.bfloat16), ("sdpa", torch.float32), ("reference", torch.float32)],
    ids=str,
)
def test_compiled_equals_eager(backend, dtype):
    q, kv, dout = random_inputs(2, 33, 2, 72, 7, dtype)
    mask = mask_of("ragged", 7)
    compiled = torch.compile(text_attention, fullgraph=True, backend="aot_eager")
    with kernels_as(KernelConfig(cross_attention=backend)):
        eager = run(text_attention, q, kv, mask, dout)
        found = run(compiled, q, kv, mask, dout)
    # Only our kernels are the same code when compiled.
    tolerance = 0 if backend == "triton" else 1e-5
    torch.testing.assert_close(found, eager, rtol=tolerance, atol=tolerance)


def test_what_cannot_run_is_an_error_that_says_why():
    q, kv, _ = random_inputs(1, 3, 1, 8, 300, torch.float32)
    with pytest.raises(ValueError, match=r"mask is torch\.int64, but must be torch\.bool"):
        text_attention(q, kv, torch.ones(1, 300, dtype=torch.int64, device=DEVICE))
    with kernels_as(TRITON):
        with pytest.raises(ValueError, match="up to 256 text tokens, not 300"):
            text_attention(q, kv)
        with pytest.raises(ValueError, match="heads of up to 128, not 136"):
            text_attention(*random_inputs(1, 3, 1, 136, 7, torch.float32)[:2])
        with pytest.raises(ValueError, match=r"not torch\.float64"):
            text_attention(q.double(), kv[:, :7].double())
    # Left to choose, it takes what can.
    torch.testing.assert_close(text_attention(q, kv), text_attention_reference(q, kv))


def test_triton_on_a_cpu_without_the_interpreter_is_an_error(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    q, kv, _ = (x.cpu() for x in random_inputs(1, 3, 1, 8, 7, torch.float32))
    with kernels_as(TRITON), pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        text_attention(q, kv)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("L", [120, 256])
def test_many_queries_give_the_same_bits_every_run(L):
    q, kv, dout = random_inputs(1, 20_001, 16, 72, L, torch.bfloat16)
    check(q, kv, None, dout)
    with kernels_as(TRITON):
        first, second = (run(text_attention, q, kv, None, dout) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
