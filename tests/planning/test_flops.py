import pytest

from longtake.planning import (
    TokenGrid,
    attention_macs,
    count_tokens,
    forward_macs,
    model_flops_utilization,
    token_grid,
    training_flops,
)
from longtake.planning.tokens import latent_size

XL = {"hidden_size": 1152, "depth": 28}


# Training TFLOP per sample for the rows of Open-Sora 1.0's speed table, computed elsewhere.
@pytest.mark.parametrize(
    ("model", "num_frames", "size", "teraflops"),
    [
        ("dit", 1, 256, 0.71),
        ("pixart", 16, 256, 19.5),
        ("stdit", 16, 256, 17.1),
        ("pixart", 16, 512, 155.9),
        ("stdit", 16, 512, 73.2),
        ("pixart", 64, 512, 1870),
        ("stdit", 64, 512, 293.7),
        ("stdit", 360, 512, 1694),
    ],
)
def test_training_flops_of_published_settings(model, num_frames, size, teraflops):
    grid = token_grid(latent_size(num_frames, size, size))
    flops = training_flops(forward_macs(model, grid, **XL))
    assert flops / 1e12 == pytest.approx(teraflops, rel=4e-3)


def test_one_minute_of_1080p_takes_21_petaflops_and_29_with_recomputing():
    macs = forward_macs("stdit", TokenGrid(time=360, space=8160), **XL)
    assert training_flops(macs) / 1e15 == pytest.approx(21.6, rel=3e-3)
    assert training_flops(macs, recompute=True) / 1e15 == pytest.approx(28.8, rel=3e-3)


def test_macs_equal_a_count_of_every_matrix_product():
    """Written out product by product, (rows) x (inner) x (columns), for one block of each kind."""
    time, space, text, hidden = 3, 5, 7, 16
    tokens = time * space
    qkv = tokens * hidden * 3 * hidden
    projection = tokens * hidden * hidden
    mlp = tokens * hidden * 4 * hidden + tokens * 4 * hidden * hidden
    full = 2 * tokens * tokens * hidden  # scores, then the weighted sum of values
    spatial = time * 2 * space * space * hidden
    temporal = space * 2 * time * time * hidden
    cross = 2 * projection + 2 * tokens * text * hidden
    self_attention = qkv + projection
    expected = {
        "dit": 2 * (self_attention + full + mlp),
        "latte": 2 * (self_attention + mlp) + spatial + temporal,
        "pixart": 2 * (self_attention + full + cross + mlp),
        "stdit": 2 * (2 * self_attention + spatial + temporal + cross + mlp),
    }
    expected["stdit2"] = expected["stdit"]
    grid = TokenGrid(time=time, space=space)
    for model, macs in expected.items():
        counted = forward_macs(model, grid, hidden_size=hidden, depth=2, text_tokens=text)
        assert counted == macs, model


def test_latte_of_odd_depth_has_one_more_spatial_block():
    grid = TokenGrid(time=3, space=5)
    one = forward_macs("latte", grid, hidden_size=16, depth=1)
    assert one == grid.total * (12 * 16**2 + 2 * 16 * 5)


@pytest.mark.parametrize(
    ("model", "least_keys", "keys"),
    [
        ("stdit", 3, 3 * 5 + 3 * 3),
        ("stdit", 4, 3 * 5),
        ("stdit", 6, 0),
        ("latte", 3, 2 * 5 + 1 * 3),
        ("latte", 4, 2 * 5),
        ("pixart", 15, 3 * 15),
    ],
)
def test_attention_over_many_keys_is_counted_by_itself(model, least_keys, keys):
    grid, sizes = TokenGrid(time=3, space=5), {"hidden_size": 16, "depth": 3}
    found = attention_macs(model, grid, least_keys=least_keys, **sizes)
    assert found == 2 * 16 * grid.total * keys


def test_mlp_ratio_counts():
    grid = TokenGrid(time=1, space=4)
    narrow = forward_macs("dit", grid, hidden_size=8, depth=1, mlp_ratio=2.0)
    wide = forward_macs("dit", grid, hidden_size=8, depth=1, mlp_ratio=4.0)
    assert wide - narrow == 4 * 2 * 2 * 8**2


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="model=unet has no FLOPs formula: expected one of dit"):
        forward_macs("unet", TokenGrid(1, 1), **XL)


def test_utilization_divides_by_all_gpus():
    # Open-Sora's 7.00 clips/s per GPU of 16x256 on eight H800: 12.1 % in the same table.
    assert count_tokens(16, 256, 256) == 4096
    flops = training_flops(forward_macs("stdit", TokenGrid(time=16, space=256), **XL))
    share = model_flops_utilization(
        flops_per_sample=flops, samples_per_second=8 * 7.00, num_gpus=8, peak_flops=989e12
    )
    assert share == pytest.approx(0.121, abs=5e-4)


def test_utilization_of_an_unknown_device_is_unknown():
    share = model_flops_utilization(
        flops_per_sample=1.0, samples_per_second=1.0, num_gpus=1, peak_flops=None
    )
    assert share is None
