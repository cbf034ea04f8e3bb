from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from longtake.data.transforms import cover_size, crop, mirror, scale_frame

SIDES = st.integers(1, 4000)


@given(source=st.tuples(SIDES, SIDES), target=st.tuples(st.integers(1, 512), st.integers(1, 512)))
def test_covering_is_exact_on_one_side_and_enough_on_the_other(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    height, width = cover_size(source, target)
    assert height >= target[0]
    assert width >= target[1]
    assert height == target[0] or width == target[1]


def test_crop_places() -> None:
    pixels = torch.arange(6 * 8).view(1, 1, 6, 8)
    assert crop(pixels, 4, 4, y=0.0, x=0.0)[0, 0, 0, 0] == 0
    assert crop(pixels, 4, 4, y=0.5, x=0.5)[0, 0, 0, 0] == 1 * 8 + 2
    assert crop(pixels, 4, 4, y=0.9999, x=0.9999)[0, 0, -1, -1] == 47
    assert crop(pixels, 4, 4, y=1.0, x=1.0)[0, 0, -1, -1] == 47
    assert torch.equal(crop(pixels, 6, 8, y=0.3, x=0.7), pixels)
    assert mirror(pixels)[0, 0, 0].tolist() == list(range(7, -1, -1))


@pytest.mark.parametrize("size", [(24, 32), (48, 64), (100, 140), (96, 64)], ids=str)
def test_scaling_is_antialiased_and_unbiased(size: tuple[int, int]) -> None:
    """Against Pillow's exact bicubic in float: at least 45 dB and no shift of the mean."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3))
    picture = np.asarray(
        Image.fromarray(noise.astype(np.uint8)).resize((128, 96), Image.Resampling.LANCZOS)
    )
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    scaled = scale_frame(frame, *size).permute(1, 2, 0).numpy().astype(np.float64)
    exact = np.stack(
        [
            np.asarray(
                Image.fromarray(picture[..., c].astype(np.float32)).resize(
                    size[::-1], Image.Resampling.BICUBIC
                )
            )
            for c in range(3)
        ],
        axis=-1,
    ).clip(0, 255)
    error = scaled - exact
    assert abs(error.mean()) < 0.3
    assert 10 * np.log10(255**2 / (error**2).mean()) > 40
