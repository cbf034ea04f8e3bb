"""How many frames fit: arithmetic on what two calls took, and on a GPU what they really take."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from longtake.encoders import VideoEncoderConfig, build_video_encoder
from longtake.encoders.memory import count_that_fits, peak_bytes

GIB = 2**30


def test_frames_fill_the_bound() -> None:
    assert count_that_fits(one=GIB, two=2 * GIB, limit_gib=8, what="frame") == 8
    # What one call takes whatever its frames does not count again with every frame.
    assert count_that_fits(one=3 * GIB // 2, two=5 * GIB // 2, limit_gib=10, what="frame") == 8
    assert count_that_fits(one=GIB, two=2 * GIB, limit_gib=1.5, what="frame") == 1
    # Nothing grew from one to two, as where both round up to one block of memory.
    assert count_that_fits(one=GIB, two=GIB, limit_gib=4, what="frame") == 8


def test_a_frame_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"one frame of 2160x3840 takes 6.00 GiB, more than .*memory_gib=4: raise"
    ):
        count_that_fits(one=6 * GIB, two=12 * GIB, limit_gib=4, what="frame of 2160x3840")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measured_slices_stay_within_the_bound() -> None:
    device = torch.device("cuda")
    pixels = torch.randint(0, 256, (2, 3, 32, 256, 256), dtype=torch.uint8, device=device)
    calls = []
    for bound in (0.5, 1.0):
        config = VideoEncoderConfig(kind="diffusers", weights="random", memory_gib=bound)
        encoder = build_video_encoder(config, device)
        encoder.encode(pixels)
        frames = encoder._measured[1, 256, 256]  # type: ignore[attr-defined]
        calls.append(frames)
        part = pixels[:1, :, :1].expand(1, 3, frames, 256, 256).contiguous()
        peak = peak_bytes(partial(encoder.encode, part), device)
        assert 0.4 * bound * GIB < peak < 1.1 * bound * GIB
    assert calls[0] < calls[1]
    config = VideoEncoderConfig(kind="diffusers", weights="random", memory_gib=0.001)
    with pytest.raises(ValueError, match=r"one frame of 256x256 takes .*memory_gib=0.001"):
        build_video_encoder(config, device).encode(pixels)
