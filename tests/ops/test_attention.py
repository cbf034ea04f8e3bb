import pytest
import torch

from longtake.ops import kernels
from longtake.ops.attention import self_attention, self_attention_by
from longtake.ops.kernels import PLAIN, KernelConfig, attention_backend, kernels_as
from longtake.ops.plain_attention import attention_reference, attention_sdpa
from longtake.ops.temporal_attention import temporal_attention

torch.set_num_threads(1)


def random_qkv(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, 3, 2, 8, generator=generator, dtype=torch.float64).to(dtype)


def test_sdpa_and_reference_agree_forward_and_backward():
    results = []
    for backend in ("reference", "sdpa"):
        qkv = random_qkv().requires_grad_()
        out = self_attention_by(backend, qkv)
        results.append((out, *torch.autograd.grad(out.sin().sum(), qkv)))
    torch.testing.assert_close(results[0], results[1])


def test_configuration_decides():
    qkv = random_qkv(torch.bfloat16)
    q, k, v = qkv.unbind(2)
    with kernels_as(PLAIN):
        assert self_attention(qkv).equal(attention_reference(q, k, v))
    with kernels_as(KernelConfig(self_attention="sdpa")):
        assert self_attention(qkv).equal(attention_sdpa(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_temporal_attention_is_attention_at_every_place(backend, dtype):
    qkv = torch.randn(2, 4, 3, 3, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    with kernels_as(KernelConfig(temporal_attention=backend)):
        out = temporal_attention(qkv)
    assert out.dtype == dtype
    for s in range(3):
        place = attention_reference(*qkv[:, :, s].unbind(2))
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(out[:, :, s], place, **tolerance)


def test_self_attention_reads_the_qkv_product_in_place():
    """No operation copies q, k or v before the kernel sees them."""
    product = torch.randn(2, 5, 3 * 2 * 8)
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *qkv, **kwargs: seen.extend(qkv) or original(*qkv, **kwargs),
        )
        self_attention_by("sdpa", product.unflatten(-1, (3, 2, 8)))
    assert len(seen) == 3
    assert all(x.untyped_storage().data_ptr() == product.untyped_storage().data_ptr() for x in seen)


@pytest.mark.parametrize("kind", ["self_attention", "temporal_attention", "cross_attention"])
def test_choice_on_cpu_is_sdpa(kind):
    where = {"dtype": torch.float32, "device": torch.device("cpu")}
    assert attention_backend(kind, keys=16, head_size=8, **where) == "sdpa"


@pytest.mark.parametrize(
    ("keys", "head_size", "on_hopper", "with_fa4", "without"),
    [
        (1023, 72, True, "triton", "triton"),
        (1024, 72, True, "fa4", "triton"),
        (1024, 72, False, "triton", "triton"),
        (2048, 72, False, "fa4", "triton"),
        (2049, 72, True, "fa4", "cudnn"),
        (1024, 64, True, "cudnn", "cudnn"),
        (2048, 64, True, "fa4", "cudnn"),
        (4096, 136, True, "sdpa", "sdpa"),
    ],
)
def test_choice_on_a_gpu_goes_by_what_was_measured(
    monkeypatch, keys, head_size, on_hopper, with_fa4, without
):
    monkeypatch.setattr(kernels, "has_triton", True)
    monkeypatch.setattr(kernels, "has_cudnn_attention", lambda device: True)
    monkeypatch.setattr(kernels, "is_hopper", lambda device: on_hopper)
    where = {"dtype": torch.bfloat16, "device": torch.device("cuda", 0)}
    for has_fa4, expected in ((True, with_fa4), (False, without)):
        monkeypatch.setattr(kernels, "has_fa4", lambda device, found=has_fa4: found)
        choice = attention_backend("self_attention", keys=keys, head_size=head_size, **where)
        assert choice == expected
