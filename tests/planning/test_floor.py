"""The floors that were computed by hand from one H200's measured ceilings, and the formula's own
behaviour."""

from dataclasses import replace

import pytest

from longtake.planning import Ceilings, TokenGrid, attention_rate, floor_seconds

# One H200, PyTorch 2.11, measured 2026-11-22: the geometric mean of 745, 675, 732 and 748 TFLOP/s.
H200 = Ceilings(
    matmul_flops=783e12,
    linear_flops=724.4e12,
    copy_bytes=4.25e12,
    attention_flops=((256, 172e12), (1024, 286e12), (8160, 314e12), (65536, 328e12)),
)
DIT, STDIT, PIXART = 675_129_632, 759_620_768, 610_856_096


@pytest.mark.parametrize(
    ("model", "grid", "parameters", "micro_batch", "samples_per_second"),
    [
        ("dit", TokenGrid(1, 256), DIT, 128, 704),
        ("stdit", TokenGrid(16, 256), STDIT, 16, 29.5),
        ("stdit", TokenGrid(16, 1024), STDIT, 4, 6.6),
        ("stdit", TokenGrid(64, 1024), STDIT, 1, 1.66),
        ("stdit", TokenGrid(360, 1024), STDIT, 1, 0.275),
        ("stdit", TokenGrid(360, 8160), STDIT, 1, 1 / 59),
        ("pixart", TokenGrid(16, 256), PIXART, 16, 20.5),
        ("pixart", TokenGrid(16, 1024), PIXART, 4, 2.1),
        ("pixart", TokenGrid(64, 1024), PIXART, 1, 0.159),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, TokenGrid)) else None,
)
def test_floor_is_that_computed_by_hand(model, grid, parameters, micro_batch, samples_per_second):
    seconds = floor_seconds(
        model,
        grid,
        hidden_size=1152,
        depth=28,
        parameters=parameters,
        micro_batch=micro_batch,
        ceilings=H200,
    )
    assert 1 / seconds == pytest.approx(samples_per_second, rel=0.04)


def test_every_ceiling_matters():
    def seconds(ceilings):
        return floor_seconds(
            "stdit",
            TokenGrid(16, 256),
            hidden_size=1152,
            depth=28,
            parameters=STDIT,
            micro_batch=8,
            ceilings=ceilings,
        )

    slower = [
        replace(H200, linear_flops=H200.linear_flops / 2),
        replace(H200, copy_bytes=H200.copy_bytes / 2),
        replace(H200, attention_flops=((256, 86e12),)),
    ]
    assert all(seconds(ceilings) > 1.05 * seconds(H200) for ceilings in slower)


def test_attention_rate_lies_between_measured_points():
    assert attention_rate(H200, 16) == 172e12
    assert attention_rate(H200, 512) == pytest.approx((172e12 + 286e12) / 2)
    assert attention_rate(H200, 1_000_000) == 328e12


def test_unknown_model_has_no_floor():
    with pytest.raises(ValueError, match="model=unet has no floor"):
        floor_seconds(
            "unet",
            TokenGrid(1, 1),
            hidden_size=8,
            depth=1,
            parameters=1,
            micro_batch=1,
            ceilings=H200,
        )
