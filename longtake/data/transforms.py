"""Fitting frames into a bucket: scale until they just cover it, crop, mirror.

Scaling runs in swscale on the decoder's own YUV planes, straight to RGB of the final size. With the
accurate flags below it agrees with an exact bicubic reduction of the full-size RGB frame to 56-58
dB without bias; swscale's default flags are off by one to two grey levels, and converting at full
size first costs four times as much (720p to 256p on one core: 2.3 ms a frame against 9.1 ms;
numbers in `docs/data.md`).

Letters: T frames, C channels, H W height and width.
"""

from __future__ import annotations

from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

# swscale's BICUBIC | ACCURATE_RND | FULL_CHR_H_INT | FULL_CHR_H_INP, as numbers because PyAV before
# 17 has no names for them. Bicubic widens with the reduction, so it is also the antialiasing
# filter.
SCALING = 0x4 | 0x40000 | 0x2000 | 0x4000
# Newer PyAV would start a thread per core in every loader worker; older ones use one thread and
# have no option.
_ONE_THREAD: dict[str, Any] = (
    {"threads": 1} if tuple(map(int, av.__version__.split(".")[:1])) >= (17,) else {}
)


def cover_size(source: tuple[float, float], target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of `source` (height, width) scaled, aspect kept, to just cover `target`.

    One side equals the target's; smaller sources are enlarged.
    """
    scale = max(target[0] / source[0], target[1] / source[1])
    # At least the target: rounding must never leave a crop one pixel short.
    return max(target[0], round(source[0] * scale)), max(target[1], round(source[1] * scale))


def scale_frame(frame: av.VideoFrame, height: int, width: int) -> Tensor:
    """A decoded frame as RGB, uint8 (height, width, 3)."""
    scaled = frame.to_ndarray(
        width=width, height=height, format="rgb24", interpolation=SCALING, **_ONE_THREAD
    )
    return torch.from_numpy(np.ascontiguousarray(scaled))


def crop(pixels_TCHW: Tensor, height: int, width: int, *, y: float, x: float) -> Tensor:
    """The window of `height` x `width` at relative position y, x in [0, 1]; 0.5 is the centre."""
    free_y, free_x = pixels_TCHW.shape[-2] - height, pixels_TCHW.shape[-1] - width
    assert min(free_y, free_x) >= 0, f"{tuple(pixels_TCHW.shape)} is less than {height}x{width}"
    top = min(int(y * (free_y + 1)), free_y)
    left = min(int(x * (free_x + 1)), free_x)
    return pixels_TCHW[..., top : top + height, left : left + width]


def mirror(pixels_TCHW: Tensor) -> Tensor:
    """Left and right exchanged."""
    return pixels_TCHW.flip(-1)


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1, meant to run on the device after the copy of the bytes."""
    return pixels.float().div_(127.5).sub_(1.0)
