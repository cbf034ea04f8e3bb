"""bf16 and 8 bits: what comes back, how far off it is, and that the error told is the true one."""

import math

import pytest
import torch

from longtake.store.forms import FormError, pack, record_bytes, unpack

SHAPE = (4, 3, 6, 5)


def _stats(*, with_posterior):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(SHAPE, generator=generator) * torch.tensor([1.0, 10, 0.1, 3]).view(
        4, 1, 1, 1
    )
    logvar = torch.randn(SHAPE, generator=generator) * 2 - 12
    return mean, logvar if with_posterior else None


def _record(packed):
    return torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in packed])


@pytest.mark.parametrize("with_posterior", [False, True])
def test_bf16_comes_back_as_it_is(with_posterior):
    mean, logvar = _stats(with_posterior=with_posterior)
    packed = pack(mean, logvar, "bf16")
    assert [name for name, _ in packed] == ["mean", "logvar"][: 1 + with_posterior]
    record = _record(packed)
    assert len(record) == record_bytes(SHAPE, "bf16", with_posterior=with_posterior)
    back_mean, back_logvar = unpack(record, SHAPE, "bf16")
    assert torch.equal(back_mean, mean.bfloat16())
    assert (back_logvar is None) == (logvar is None)
    if logvar is not None:
        assert torch.equal(back_logvar, logvar.bfloat16())


@pytest.mark.parametrize("with_posterior", [False, True])
def test_8_bits_are_off_by_half_a_step_at_most(with_posterior):
    mean, logvar = _stats(with_posterior=with_posterior)
    record = _record(pack(mean, logvar, "8bit"))
    assert len(record) == record_bytes(SHAPE, "8bit", with_posterior=with_posterior)
    for values, back in zip((mean, logvar), unpack(record, SHAPE, "8bit"), strict=True):
        if values is None:
            assert back is None
            continue
        step = (values.amax((2, 3)) - values.amin((2, 3))) / 255
        off = (back - values).abs().amax((2, 3))
        assert (off <= step * 0.501).all()
        assert (off >= step * 0.3).all(), "better than 8 bits can be"


def test_a_constant_plane_survives_8_bits():
    mean = torch.full(SHAPE, -3.25)
    mean[1] = 0.0
    back, _ = unpack(_record(pack(mean, None, "8bit")), SHAPE, "8bit")
    assert torch.equal(back, mean)


def test_the_stated_error_is_the_true_one():
    error, parts = FormError(), [FormError(), FormError()]
    scale = torch.tensor([0.5, 0.1, 5.0, 0.3])
    exact, off, deviations, deviations_off = [], [], [], []
    for number, seed in enumerate((0, 1)):
        torch.manual_seed(seed)
        mean, logvar = torch.randn(SHAPE) * 2 + 1, torch.randn(SHAPE) - 4
        packed = pack(mean, logvar, "8bit")
        error.add(mean, logvar, packed, scale)
        parts[number].add(mean, logvar, packed, scale)
        back_mean, back_logvar = unpack(_record(packed), SHAPE, "8bit")
        rows = scale.view(4, 1, 1, 1)
        exact.append(mean.bfloat16().float() * rows)
        off.append(back_mean * rows - exact[-1])
        deviations.append((logvar.bfloat16().float() / 2).exp() * rows)
        deviations_off.append((back_logvar / 2).exp() * rows - deviations[-1])
    parts[0].merge(parts[1])
    for summary in (error.summary(), parts[0].summary()):
        assert summary["rms_error"] == pytest.approx(float(torch.stack(off).square().mean().sqrt()))
        assert summary["largest_error"] == pytest.approx(
            float(torch.stack(off).abs().max()), rel=1e-4
        )
        std = float(torch.stack(exact).std(correction=0))
        assert summary["latents_std"] == pytest.approx(std)
        squares = [float(torch.stack(x).square().sum()) for x in (deviations_off, deviations)]
        relative = math.sqrt(squares[0] / squares[1])
        assert summary["posterior_std_relative_error"] == pytest.approx(relative, rel=1e-4)
    assert FormError().summary() == {}


def test_records_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"719 bytes for latents of shape \(4, 3, 6, 5\) as bf16"):
        unpack(torch.zeros(719, dtype=torch.uint8), SHAPE, "bf16")
    with pytest.raises(ValueError, match=r"no multiple of 4 values, .*: use --latents bf16"):
        pack(torch.zeros(3, 1, 1, 1), None, "8bit")
