"""Reading a clip: only the frames asked for, by their timestamps, bounded in pixels and time.

A video is a list of (presentation time, picture). Frame k of a clip is the picture on screen at
start + k * frame_interval / fps, so variable frame rates come out right; with fps=None it is the
video's own frames, every frame_interval-th of them.

Letters: T frames, C channels, H W height and width.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream
from torch import Tensor

from longtake.data.files import MediaError, open_regular
from longtake.data.image import is_image, read_image
from longtake.data.transforms import Fit, fit_frame, scale_frame, upright

# Media containers only. Playlists (HLS, DASH, ffconcat) would make FFmpeg open other files by name.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegps,mpegts,mpegvideo,ogg,gif,flv,asf,"
    "h264,hevc,ivf"
)
# Titles in an odd encoding must not make a video unreadable; PyAV 19 decodes none unasked.
_LENIENT_METADATA: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)
# Seconds. Matroska rounds timestamps to milliseconds: a frame may claim to start half a one late.
_TIME_SLACK = 0.6e-3
# Seconds. Containers index key frames by decoding time, a few frames before presentation.
_SEEK_MARGIN = 0.25
# Frames per second, for streams that do not say.
_USUAL_RATE = 25.0


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What one file may cost before it is given up."""

    max_pixels: int = 64_000_000
    """Of one frame; 8K is 33 million."""
    max_decoded_frames: int = 20_000
    """Per clip, with those decoded on the way from the key frame before it."""
    max_seconds: float = 30.0
    """Wall-clock time per clip."""


@dataclass(frozen=True)
class MediaInfo:
    """What a file's header says; height and width are those of the upright picture."""

    is_image: bool
    height: int
    width: int
    num_frames: int | None
    """An estimate from the header, None if it says nothing."""
    fps: float | None
    duration: float | None
    """Seconds."""


def probe(path: str | os.PathLike[str], *, limits: MediaLimits = MediaLimits()) -> MediaInfo:
    """Size, length and rate of a file; decodes its first frame.

    Raises:
        MediaError: see `read_clip`.
    """
    if is_image(path):
        pixels_CHW = read_image(path, max_pixels=limits.max_pixels)
        return MediaInfo(True, pixels_CHW.shape[1], pixels_CHW.shape[2], 1, None, None)
    with _open_video(path, limits) as video:
        for _, frame in video.frames():
            height, width = video.upright_size(frame)
            break
        else:
            raise MediaError(path, "no_video", "the video stream has no frame")
        num_frames = video.stream.frames or None
        if num_frames is None and video.duration is not None and video.rate is not None:
            num_frames = round(video.duration * video.rate)
        return MediaInfo(False, height, width, num_frames, video.rate, video.duration)


def read_clip(
    path: str | os.PathLike[str],
    *,
    num_frames: int,
    start: float = 0.0,
    end: float | None = None,
    fps: float | None = None,
    frame_interval: int = 1,
    position: float = 0.0,
    fit: Fit | None = None,
    limits: MediaLimits = MediaLimits(),
) -> Tensor:
    """`num_frames` frames as pixels_TCHW, uint8 RGB, upright.

    Args:
        start: seconds from the first frame where the usable range begins.
        end: seconds where it ends (exclusive); None is the end of the file.
        fps: frames per second to resample to; None takes the video's own frames.
        position: in [0, 1); where in the usable range the clip lies, 0 at its beginning.
        fit: size and place of the picture to cut out of each frame; None takes whole frames.

    An image is a video of one frame.

    Raises:
        MediaError: missing, not media of an allowed kind, damaged, too short or beyond `limits`.
    """
    if is_image(path):
        if num_frames > 1:
            text = f"1 frame of the {num_frames} needed: it is an image"
            raise MediaError(path, "too_short", text)
        return read_image(path, fit=fit, max_pixels=limits.max_pixels)[None]
    wanted = _Wanted(num_frames, start, end, fps, frame_interval)
    deadline = time.monotonic() + limits.max_seconds
    with _open_video(path, limits, deadline) as video:
        first = wanted.first_time(position, video)
        frames = _collect(video, wanted, first, fit)
    if len(frames) < num_frames and first > start:
        # The header promised more than there is: take the beginning of the range.
        with _open_video(path, limits, deadline) as video:
            frames = _collect(video, wanted, start, fit)
    if len(frames) < num_frames:
        until = "its end" if end is None else f"{end:g} s"
        text = f"{len(frames)} frames of the {num_frames} needed between {start:g} s and {until}"
        raise MediaError(path, "too_short", text)
    return torch.stack(frames)


@dataclass(frozen=True)
class _Wanted:
    """Which frames a clip is made of; times in seconds from the video's first frame."""

    num_frames: int
    start: float
    end: float | None
    fps: float | None
    frame_interval: int

    def first_time(self, position: float, video: _Video) -> float:
        """Where the clip begins: `start`, or later on the grid of the video's own frames."""
        ends = [value for value in (self.end, video.duration) if value is not None]
        if position <= 0 or not ends or not video.rate:
            return self.start
        slack = min(ends) - self.start - self.span(video.rate)
        # The small term keeps a slack of 3.9999 frames from losing its fourth place.
        places = math.floor(slack * video.rate + 1e-3) + 1
        if places <= 1:
            return self.start
        return self.start + min(int(position * places), places - 1) / video.rate

    def span(self, rate: float) -> float:
        """Seconds of video that the clip needs."""
        steps = (self.num_frames - 1) * self.frame_interval
        return (steps + 1) / rate if self.fps is None else steps / self.fps + 1 / rate


@dataclass
class _Video:
    """An opened video stream. Times are seconds from its first presented frame."""

    path: str
    container: InputContainer
    stream: VideoStream
    limits: MediaLimits
    deadline: float
    origin: float
    rate: float | None
    duration: float | None

    def frames(self, first: float = 0.0) -> Iterator[tuple[float, av.VideoFrame]]:
        """(time, frame) in presentation order, from the key frame before time `first` on."""
        if first > _SEEK_MARGIN:
            self._seek(first - _SEEK_MARGIN)
            decoded = self._decode()
            head = next(decoded, None)
            if head is not None and head[0] <= first + _TIME_SLACK:
                yield head
                yield from decoded
                return
            # The seek landed behind the first frame wanted (no index, or a broken one): decode from
            # the beginning. Some formats find it only before their first time, others only at it.
            try:
                self._seek(-1.0)
            except FFmpegError:
                self._seek(0.0)
        yield from self._decode()

    def _seek(self, seconds: float) -> None:
        assert self.stream.time_base is not None
        ticks = int((seconds + self.origin) / self.stream.time_base)
        self.container.seek(ticks, stream=self.stream, backward=True)

    def _decode(self) -> Iterator[tuple[float, av.VideoFrame]]:
        gap = 1 / (self.rate or _USUAL_RATE)
        last = -gap
        count = 0
        for packet in self.container.demux(self.stream):
            # Looked at for each packet, as damaged ones may never become a frame.
            if time.monotonic() > self.deadline:
                text = f"decoding took longer than max_seconds={self.limits.max_seconds:g}"
                raise MediaError(self.path, "too_slow", text)
            for frame in packet.decode():
                assert isinstance(frame, av.VideoFrame)
                count += 1
                if count > self.limits.max_decoded_frames:
                    limit = self.limits.max_decoded_frames
                    text = f"more than max_decoded_frames={limit} to decode to get at the clip"
                    raise MediaError(self.path, "too_large", text)
                # A few raw streams carry no timestamps: count frames instead.
                last = frame.time - self.origin if frame.time is not None else last + gap
                yield last, frame

    def frame_end(self, at: float, frame: av.VideoFrame) -> float:
        """When the picture that appears at `at` leaves the screen, if no other replaces it."""
        if frame.duration and frame.time_base:
            return at + float(frame.duration * frame.time_base)
        return at + 1 / (self.rate or _USUAL_RATE)

    def upright_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """(height, width) as shown: square pixels, rotation applied."""
        aspect = float(self.stream.sample_aspect_ratio or 1)
        # Outside this range it is a damaged header rather than an anamorphic lens.
        width = round(frame.width * aspect) if 0.25 <= aspect <= 4 else frame.width
        return (width, frame.height) if _quarter_turns(frame) % 2 else (frame.height, width)

    def picture(self, frame: av.VideoFrame, fit: Fit | None) -> Tensor:
        """The frame as shown, uint8 (3, H, W)."""
        if frame.is_corrupt:
            raise MediaError(self.path, "corrupt", "the decoder marks a frame as damaged")
        if frame.width * frame.height > self.limits.max_pixels:
            raise _too_many_pixels(self.path, frame.width, frame.height, self.limits)
        shown, turns = self.upright_size(frame), _quarter_turns(frame)
        if fit is not None:
            return fit_frame(frame, fit, shown=shown, turns=turns)
        height, width = shown[::-1] if turns % 2 else shown
        return upright(scale_frame(frame, height, width), turns).contiguous()


def _collect(video: _Video, wanted: _Wanted, first: float, fit: Fit | None) -> list[Tensor]:
    """The pictures from `first` on, uint8 (3, H, W); fewer than wanted if the range ends before."""
    select = _own_frames if wanted.fps is None else _resampled_frames
    pictures: list[Tensor] = []
    for frame, repeats in select(video, wanted, first):
        picture = video.picture(frame, fit)
        if pictures and pictures[0].shape != picture.shape:
            raise MediaError(video.path, "unsupported", "the frame size changes inside the clip")
        pictures.extend([picture] * repeats)
    return pictures


def _own_frames(
    video: _Video, wanted: _Wanted, first: float
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Every frame_interval-th frame that appears from `first` on."""
    # A place chosen on the grid of frames may miss the true timestamps by a little.
    slack = _TIME_SLACK if first == wanted.start else 0.5 / (video.rate or _USUAL_RATE)
    end = math.inf if wanted.end is None else wanted.end
    seen = 0
    for at, frame in video.frames(first):
        if at < first - slack:
            continue
        if at >= end - _TIME_SLACK:
            return
        if seen % wanted.frame_interval == 0:
            yield frame, 1
        seen += 1
        if seen > (wanted.num_frames - 1) * wanted.frame_interval:
            return


def _resampled_frames(
    video: _Video, wanted: _Wanted, first: float
) -> Iterator[tuple[av.VideoFrame, int]]:
    """The frames on screen at first + k * frame_interval / fps, each with how many k see it."""
    assert wanted.fps is not None
    end = math.inf if wanted.end is None else wanted.end
    targets = [first + k * wanted.frame_interval / wanted.fps for k in range(wanted.num_frames)]
    missing = deque(target for target in targets if target < end - _TIME_SLACK)

    def take(until: float) -> int:
        """Removes the targets before `until` and counts them."""
        before = len(missing)
        while missing and missing[0] + _TIME_SLACK < until:
            missing.popleft()
        return before - len(missing)

    shown: tuple[float, av.VideoFrame] | None = None
    for at, frame in video.frames(first):
        # Until `at` the screen shows the frame before; before the very first one, that first one.
        if repeats := take(at):
            yield (frame if shown is None else shown[1]), repeats
        if not missing:
            return
        shown = at, frame
    if shown is not None and (repeats := take(video.frame_end(*shown) + _TIME_SLACK)):
        yield shown[1], repeats


@contextmanager
def _open_video(
    path: str | os.PathLike[str], limits: MediaLimits, deadline: float | None = None
) -> Iterator[_Video]:
    """Opens the first real video stream; what the decoder raises inside becomes a MediaError."""
    deadline = time.monotonic() + limits.max_seconds if deadline is None else deadline
    # The limit is given twice: while probing, and to the decoder itself.
    decoder_options = {"max_pixels": str(limits.max_pixels)}
    try:
        # A file object, not a name: names such as concat:... or http:... mean nothing here.
        with (
            open_regular(path) as file,
            av.open(
                file,
                mode="r",
                options=decoder_options,
                container_options={"format_whitelist": _FORMATS},
                **_LENIENT_METADATA,
                buffer_size=1 << 18,
            ) as container,
        ):
            stream = _video_stream(container, path)
            context = stream.codec_context
            if context.width * context.height > limits.max_pixels:
                raise _too_many_pixels(path, context.width, context.height, limits)
            context.options = decoder_options
            # Workers are the parallelism; FFmpeg's frame threads have also been seen to hang there.
            context.thread_count = 1
            rate = stream.average_rate or stream.guessed_rate
            tick = stream.time_base
            duration = None
            if stream.duration is not None and tick is not None:
                duration = float(stream.duration * tick)
            elif container.duration is not None:
                duration = container.duration / av.time_base
            yield _Video(
                str(path),
                container,
                stream,
                limits,
                deadline,
                origin=float((stream.start_time or 0) * tick) if tick else 0.0,
                rate=float(rate) if rate else None,
                duration=duration,
            )
    except MediaError:
        raise
    except MemoryError as error:
        raise MediaError(
            path, "too_large", f"needs too much memory: {error or 'allocation failed'}"
        ) from error
    except Exception as error:
        # Damaged files make PyAV raise IndexError, UnicodeDecodeError, EOFError and others, too.
        text = f"cannot be decoded ({type(error).__name__}: {_first_line(error)})"
        raise MediaError(path, "unreadable", text) from error


def _video_stream(container: InputContainer, path: str | os.PathLike[str]) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
    raise MediaError(path, "no_video", f"has no video stream; it has: {kinds}")


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that make the frame upright, 0..3."""
    return round(frame.rotation / 90) % 4


def _too_many_pixels(
    path: str | os.PathLike[str], width: int, height: int, limits: MediaLimits
) -> MediaError:
    text = f"{width}x{height} is more than max_pixels={limits.max_pixels}"
    return MediaError(path, "too_large", text)


def _first_line(error: Exception) -> str:
    # The system's words without the number and the name of the file object that PyAV adds.
    text = getattr(error, "strerror", None) or str(error)
    return text.split("\n")[0][:200]
