"""norm_modulate, gated_residual, rms_norm, rotary and sincos against their formulas."""

import math

import pytest
import torch

from longtake.ops.gated_residual import gated_residual
from longtake.ops.norm_modulate import norm_modulate
from longtake.ops.rms_norm import rms_norm
from longtake.ops.rotary import rotary
from longtake.ops.sincos import _sincos, sincos

torch.set_num_threads(1)

LAYOUTS = {"BND": ((2, 5, 12), (2, 1, 12)), "BTSD": ((2, 3, 5, 12), (2, 1, 1, 12))}


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize(("tokens", "row"), LAYOUTS.values(), ids=LAYOUTS)
def test_norm_modulate_is_the_formula(tokens, row):
    x, shift, scale = draw(*tokens), draw(*row), draw(*row)
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    expected = (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift
    torch.testing.assert_close(norm_modulate(x, shift, scale), expected)
    assert torch.autograd.gradcheck(norm_modulate, (x, shift, scale))


def test_norm_modulate_in_bfloat16_is_as_good_as_rounding():
    x, shift, scale = (
        draw(*s, dtype=torch.bfloat16) for s in ((2, 50, 64), (2, 1, 64), (2, 1, 64))
    )
    out = norm_modulate(x, shift, scale)
    exact = norm_modulate(x.double(), shift.double(), scale.double())
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize(("tokens", "row"), LAYOUTS.values(), ids=LAYOUTS)
def test_gated_residual_is_the_formula(tokens, row):
    x, gate, y = draw(*tokens), draw(*row), draw(*tokens)
    torch.testing.assert_close(gated_residual(x, gate, y), x + gate * y)
    assert torch.autograd.gradcheck(gated_residual, (x, gate, y))


def test_rms_norm_is_the_formula():
    x, weight = draw(2, 5, 3, 8), draw(8)
    expected = x / ((x**2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight), expected)
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert rms_norm(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16


def test_sincos_is_the_closed_form():
    table = sincos(torch.tensor([0.0, 1.0, 2.5, 359.0], dtype=torch.float64), 6)
    assert table.shape == (4, 12)
    assert table.dtype == torch.float32
    for row, position in zip(table.tolist(), (0.0, 1.0, 2.5, 359.0), strict=True):
        angles = [position / 10000 ** (i / 6) for i in range(6)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert row == pytest.approx(expected, abs=1e-7)


def test_sincos_is_the_operation_it_is_registered_as():
    torch.library.opcheck(_sincos, (torch.arange(3.0, dtype=torch.float32), 4))


def test_sincos_works_on_meta():
    assert sincos(torch.empty(3, device="meta"), 4).shape == (3, 8)


def turned(x, first_frame=0, time_scale=1.0):
    places = torch.arange(first_frame, first_frame + x.shape[1], dtype=torch.float64) / time_scale
    sin, cos = sincos(places, x.shape[-1] // 2).chunk(2, dim=1)
    return rotary(x, sin, cos)


def test_rotary_turns_neighbouring_pairs_as_complex_numbers():
    x = draw(1, 4, 2, 3, 8)
    angle = torch.arange(4.0, dtype=torch.float64)[:, None] * 10000 ** -(torch.arange(4) / 4)
    pairs = torch.view_as_complex(x.detach().unflatten(-1, (4, 2)))
    expected = pairs * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    torch.testing.assert_close(
        turned(x).unflatten(-1, (4, 2)), torch.view_as_real(expected), rtol=1e-6, atol=1e-6
    )
    assert torch.autograd.gradcheck(turned, (x,))


def test_rotary_scores_depend_on_distance_only():
    q, k = draw(1, 4, 1, 1, 8), draw(1, 4, 1, 1, 8)

    def scores(first_frame):
        return torch.einsum(
            "btsae,busae->btu", turned(q, first_frame, 2.0), turned(k, first_frame, 2.0)
        )

    torch.testing.assert_close(scores(0), scores(50), rtol=1e-5, atol=1e-5)


def test_rotary_keeps_bfloat16():
    assert turned(draw(1, 4, 1, 1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
