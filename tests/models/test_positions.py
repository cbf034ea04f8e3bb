"""Positions at the public models' own settings, by their published formulas."""

import numpy as np
import pytest
import torch
from reference_models import space_table, time_table

from longtake.models import ModelConfig
from longtake.models.positions import spatial_positions, temporal_positions, video_positions

# space_scale and base_size of: DiT 256; PixArt 512; Open-Sora 1.0 at 256; PixArt 1024-MS, wide.
SETTINGS = {
    "dit_256": (16, 16, 1.0, None),
    "pixart_512": (32, 32, 1.0, 32),
    "opensora_256": (16, 16, 0.5, None),
    "pixart_1024_wide": (34, 60, 2.0, 64),
}


@pytest.mark.parametrize(
    ("height", "width", "space_scale", "base_size"), SETTINGS.values(), ids=SETTINGS
)
def test_spatial_positions_equal_formula(height, width, space_scale, base_size):
    config = ModelConfig(size="S", space_scale=space_scale, base_size=base_size)
    table = spatial_positions(height, width, config)
    assert table.dtype == torch.float32
    expected = space_table(height, width, 384, space_scale, base_size)
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)


def test_first_half_is_the_column():
    table = spatial_positions(3, 5, ModelConfig(size="tiny")).view(3, 5, 2, 64)
    assert torch.equal(table[0, :, 0], table[2, :, 0])
    assert torch.equal(table[:, 0, 1], table[:, 4, 1])


@pytest.mark.parametrize("time_scale", [1.0, 2 / 3])
def test_temporal_positions_equal_formula(time_scale):
    table = temporal_positions(64, ModelConfig(size="S", time_scale=time_scale))
    torch.testing.assert_close(table, time_table(64, 384, time_scale), rtol=0, atol=1e-6)


def test_long_times_are_exact():
    """Frame 10,000 in float32 angles would be off by 1e-3."""
    last = temporal_positions(10_001, ModelConfig(size="tiny"))[-1]
    angles = 10_000 / 10_000 ** (np.arange(64) / 64)
    expected = np.concatenate([np.sin(angles), np.cos(angles)])
    assert np.abs(last.numpy() - expected).max() < 1e-7


def test_an_image_has_no_position_in_time():
    config = ModelConfig(size="tiny")
    assert torch.equal(video_positions(1, 2, 3, config)[0], spatial_positions(2, 3, config))
    video = video_positions(4, 2, 3, config)
    assert video.shape == (4, 6, 128)
    expected = spatial_positions(2, 3, config) + temporal_positions(4, config)[2]
    torch.testing.assert_close(video[2], expected)
