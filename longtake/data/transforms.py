"""Fitting frames into a bucket: scale until they just cover it, crop, mirror.

Scaling runs in swscale on the decoder's own YUV planes, straight to RGB of the final size. With the
accurate flags below it agrees with an exact bicubic reduction of the full-size RGB frame to 52-58
dB without bias; swscale's default flags are off by one to two grey levels, and converting at full
size first costs four times as much (720p to 256p on one core: 2.3 ms a frame against 9.1 ms).

Letters: T frames, C channels, H W height and width.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

# swscale's BICUBIC | ACCURATE_RND | FULL_CHR_H_INT | FULL_CHR_H_INP, as numbers: PyAV 17 does not
# name the last three. Bicubic widens with the reduction, so it is the antialiasing filter, too.
SCALING = 0x4 | 0x40000 | 0x2000 | 0x4000
# How many times its target's pixels a scaled frame may have: panoramas yes, strips of a pixel no.
_MAX_COVER = 64


def cover_size(source: tuple[float, float], target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of `source` (height, width) scaled, aspect kept, to just cover `target`.

    One side equals the target's; smaller sources are enlarged.
    """
    scale = max(target[0] / source[0], target[1] / source[1])
    # At least the target: rounding must never leave a crop one pixel short.
    return max(target[0], round(source[0] * scale)), max(target[1], round(source[1] * scale))


@dataclass(frozen=True)
class Fit:
    """The picture wanted of a frame: `height` x `width` cut out of it once scaled to cover that."""

    height: int
    width: int
    y: float = 0.5
    """Relative place of the cut in [0, 1]; 0.5 is the centre."""
    x: float = 0.5


def fit_frame(frame: av.VideoFrame, fit: Fit, *, shown: tuple[int, int], turns: int = 0) -> Tensor:
    """The part of a decoded frame that `fit` asks for, RGB, uint8 (3, fit.height, fit.width).

    `shown` is the frame's (height, width) as people see it: upright, square pixels; `turns` are
    the counter-clockwise quarter turns that make it upright.

    Raises:
        MemoryError: a strip so thin that covering the picture would make it huge.
    """
    height, width = cover_size(shown, (fit.height, fit.width))
    if height * width > _MAX_COVER * fit.height * fit.width:
        raise MemoryError(f"{shown[1]}x{shown[0]} scaled to cover {fit.width}x{fit.height}")
    # Scaled before it is turned: far fewer pixels to move.
    pixels_CHW = scale_frame(frame, *((width, height) if turns % 2 else (height, width)))
    return crop(upright(pixels_CHW, turns), fit.height, fit.width, y=fit.y, x=fit.x).contiguous()


def scale_frame(frame: av.VideoFrame, height: int, width: int) -> Tensor:
    """A decoded frame as RGB of another size, uint8 (3, height, width).

    Needs PyAV 17: version 16 converts BT.709 video as if it were BT.601.
    """
    scaled = reformat(frame, width=width, height=height, format="rgb24")
    return torch.from_numpy(np.ascontiguousarray(scaled.to_ndarray())).permute(2, 0, 1)


def reformat(frame: av.VideoFrame, **changes: Any) -> av.VideoFrame:
    """A frame of another size, format or colour space, by the scaling above.

    Through a scaler of this process's own, on one thread. PyAV 19 keeps one scaler per Python
    thread, with a pool of threads once anyone has asked for them; a loader worker forked from such
    a process inherits the scaler but not its threads, and waits for them for ever.
    """
    return _own_scaler(os.getpid()).reformat(frame, interpolation=SCALING, threads=1, **changes)


@lru_cache(maxsize=1)
def _own_scaler(process_id: int) -> VideoReformatter:
    return VideoReformatter()


def upright(pixels_CHW: Tensor, turns: int) -> Tensor:
    """Turned counter-clockwise by `turns` quarters."""
    return pixels_CHW.rot90(turns, (-2, -1)) if turns else pixels_CHW


def crop(pixels_CHW: Tensor, height: int, width: int, *, y: float, x: float) -> Tensor:
    """The window of `height` x `width` at relative position y, x in [0, 1]; 0.5 is the centre."""
    free_y, free_x = pixels_CHW.shape[-2] - height, pixels_CHW.shape[-1] - width
    assert min(free_y, free_x) >= 0, f"{tuple(pixels_CHW.shape)} is less than {height}x{width}"
    top = min(int(y * (free_y + 1)), free_y)
    left = min(int(x * (free_x + 1)), free_x)
    return pixels_CHW[..., top : top + height, left : left + width]


def mirror(pixels_TCHW: Tensor) -> Tensor:
    """Left and right exchanged."""
    return pixels_TCHW.flip(-1)
