"""Tiny media made on the fly: frame i of a video is plain grey 8 * i + 8, so pixels name it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

HEIGHT, WIDTH = 48, 64
MAX_FRAMES = 30


def grey(index: int) -> int:
    return 8 * index + 8


def make_video(
    path: Path,
    num_frames: int = 24,
    *,
    fps: int = 8,
    times_ms: Sequence[int] | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    gop: int = 8,
    rotation: float | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    audio: bool = False,
    aspect: Fraction | None = None,
    frames_HWC: Sequence[np.ndarray] | None = None,
    container: str | None = None,
) -> Path:
    """A video whose frames appear at `times_ms`, or every 1/fps seconds."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if codec == "libx264":
            stream.options = {"crf": "8", "preset": "veryfast"}
        else:
            stream.bit_rate = 4_000_000
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if audio:
            sound = output.add_stream("aac", rate=16000)
        for index in range(num_frames):
            if frames_HWC is not None:
                array = frames_HWC[index]
            else:
                array = np.full((*size, 3), grey(index), np.uint8)
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = times_ms[index] if times_ms is not None else round(index * 1000 / fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if audio:
            samples = np.zeros((1, 1024), np.float32)
            for index in range(4):
                tone = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
                tone.sample_rate, tone.pts = 16000, index * 1024
                output.mux(sound.encode(tone))
            output.mux(sound.encode())
    return path


def frame_numbers(pixels_TCHW: Tensor) -> list[int]:
    """Which frames of `make_video` these are."""
    means = pixels_TCHW.float().mean(dim=(1, 2, 3))
    numbers = ((means - 8) / 8).round()
    assert ((means - 8) / 8 - numbers).abs().max() < 0.3, means
    return [int(number) for number in numbers]


def write_jsonl(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
