import pytest
import torch

from longtake.ops.attention import attention, attention_reference, choose_backend
from longtake.ops.temporal_attention import temporal_attention

torch.set_num_threads(1)


def random_qkv(num_queries=5, num_keys=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randn(3, count, 2, 8, generator=generator, dtype=torch.float64).to(dtype)

    return draw(num_queries), draw(num_keys), draw(num_keys)


MASKS = {
    "no_mask": None,
    "ragged": torch.arange(7)[None] < torch.tensor([[7], [3], [1]]),
    "one_empty": torch.arange(7)[None] < torch.tensor([[7], [0], [2]]),
    "holes": torch.tensor([[1, 0, 1, 1, 0, 0, 1]] * 3, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_backends_agree_forward_and_backward(mask):
    results = []
    for backend in ("reference", "sdpa"):
        qkv = [x.requires_grad_() for x in random_qkv()]
        out = attention(*qkv, mask, backend=backend)
        results.append((out, *torch.autograd.grad(out.sin().sum(), qkv)))
    torch.testing.assert_close(results[0], results[1])


def test_masked_keys_are_as_if_absent():
    q, k, v = random_qkv()
    out = attention(q, k, v, MASKS["ragged"])
    for b, length in enumerate((7, 3, 1)):
        alone = attention_reference(q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length])
        torch.testing.assert_close(out[b : b + 1], alone)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_valid_key_gives_zeros_and_no_nan(backend, dtype):
    qkv = [x.requires_grad_() for x in random_qkv(dtype=dtype)]
    out = attention(*qkv, MASKS["one_empty"], backend=backend)
    assert out.dtype == dtype
    assert (out[1] == 0).all()
    for gradient in torch.autograd.grad(out.sum(), qkv):
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temporal_attention_is_attention_at_every_place(dtype):
    qkv_BTS = torch.randn(2, 4, 3, 3, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = qkv_BTS.unbind(3)  # strided views, as out of a QKV product
    out = temporal_attention(q, k, v)
    assert out.dtype == dtype
    for s in range(3):
        place = attention_reference(q[:, :, s], k[:, :, s], v[:, :, s])
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(out[:, :, s], place, **tolerance)


def test_self_attention_reads_the_qkv_product_in_place():
    """No operation copies q, k or v before the kernel sees them."""
    product = torch.randn(2, 5, 3 * 2 * 8)
    q, k, v = product.unflatten(-1, (3, 2, 8)).unbind(-3)
    assert {x.untyped_storage().data_ptr() for x in (q, k, v)} == {
        product.untyped_storage().data_ptr()
    }
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *qkv, **kwargs: seen.extend(qkv) or original(*qkv, **kwargs),
        )
        attention(q, k, v, backend="sdpa")
    assert all(x.untyped_storage().data_ptr() == product.untyped_storage().data_ptr() for x in seen)


def test_mask_of_integers_is_refused():
    with pytest.raises(ValueError, match=r"torch.int64, but must be torch.bool.*mask.bool\(\)"):
        attention(*random_qkv(), torch.ones(3, 7, dtype=torch.int64))


def test_choice_on_cpu_is_sdpa():
    q, k, _ = random_qkv()
    assert choose_backend(q, k, masked=False) == "sdpa"
    assert choose_backend(q, k, masked=True) == "sdpa"
