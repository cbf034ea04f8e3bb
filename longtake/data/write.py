"""Writing pictures and clips for people: browsers play them, and a file is complete or absent.

Letters: T frames, C channels, H W height and width.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import Colorspace
from PIL import Image
from torch import Tensor

from longtake.data.transforms import reformat

_BT709 = 1


def write_video(path: str | os.PathLike[str], pixels_TCHW: Tensor, fps: float) -> None:
    """Writes an H.264 mp4 (yuv420p, BT.709, index first) that browsers play.

    yuv420p needs even sides: an odd one repeats its last row or column.
    """
    _check_pixels(pixels_TCHW, dims=4)
    if not fps > 0:
        raise ValueError(f"fps={fps} must be positive")
    height, width = pixels_TCHW.shape[-2:]
    frames_TCHW = F.pad(pixels_TCHW.cpu(), (0, width % 2, 0, height % 2), mode="replicate")
    frames_THWC = frames_TCHW.permute(0, 2, 3, 1).contiguous().numpy()
    with (
        _replacing(path) as temporary,
        # An absolute name: FFmpeg would read "a:b.mp4" as protocol "a". It opens the file twice for
        # faststart.
        av.open(
            str(temporary.absolute()), mode="w", format="mp4", options={"movflags": "faststart"}
        ) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # crf 16 is visually lossless. One thread makes the bytes the same everywhere; so it is
        # without x264's mbtree, whose code for AVX-512 gives others from call to call.
        stream.options = {"crf": "16", "preset": "medium", "mbtree": "0"}
        stream.codec_context.thread_count = 1
        stream.codec_context.colorspace = _BT709
        stream.codec_context.color_primaries = _BT709
        stream.codec_context.color_trc = _BT709
        for frame_HWC in frames_THWC:
            rgb = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            frame = reformat(rgb, format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_image(path: str | os.PathLike[str], pixels_CHW: Tensor) -> None:
    """Writes a PNG."""
    _check_pixels(pixels_CHW, dims=3)
    array_HWC = np.ascontiguousarray(pixels_CHW.cpu().permute(1, 2, 0).numpy())
    with _replacing(path) as temporary:
        Image.fromarray(array_HWC).save(temporary, format="PNG")


def contact_sheet(pixels_TCHW: Tensor, *, columns: int = 4, max_frames: int = 16) -> Tensor:
    """Up to `max_frames` frames, evenly spread from first to last, in rows on white, uint8 CHW."""
    _check_pixels(pixels_TCHW, dims=4)
    count = min(max_frames, len(pixels_TCHW))
    chosen = torch.linspace(0, len(pixels_TCHW) - 1, count).round().long()
    frames_TCHW = pixels_TCHW.cpu()[chosen]
    columns = min(columns, count)
    rows, gap = math.ceil(count / columns), 4
    height, width = frames_TCHW.shape[-2:]
    sheet_CHW = torch.full(
        (3, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8
    )
    for index, frame_CHW in enumerate(frames_TCHW):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet_CHW[:, top : top + height, left : left + width] = frame_CHW
    return sheet_CHW


def _check_pixels(pixels: Tensor, *, dims: int) -> None:
    if pixels.dtype != torch.uint8 or pixels.dim() != dims or pixels.shape[-3] != 3:
        wanted = "(T, 3, H, W)" if dims == 4 else "(3, H, W)"
        raise ValueError(
            f"pixels are {pixels.dtype} {tuple(pixels.shape)}: expected uint8 {wanted}"
        )
    if pixels.numel() == 0:
        raise ValueError(f"pixels {tuple(pixels.shape)} are empty: nothing to write")


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty file that takes the name `path` when the block ends well, and vanishes otherwise."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.close(descriptor)
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
