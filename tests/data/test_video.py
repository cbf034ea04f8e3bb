from __future__ import annotations

import contextlib
import os
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from longtake.data import Fit, MediaError, MediaLimits, probe, read_clip
from tests.data.media import MAX_FRAMES, frame_numbers, make_video


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames at 8 per second: 3 seconds."""
    return make_video(tmp_path_factory.mktemp("steady") / "steady.mp4", 24)


def reason_of(path: Path, **options: object) -> str:
    with pytest.raises(MediaError) as caught:
        read_clip(path, **{"num_frames": 4, **options})  # type: ignore[arg-type]
    assert str(path) in str(caught.value)
    return caught.value.reason


def test_own_frames_come_from_the_start(steady: Path) -> None:
    clip = read_clip(steady, num_frames=6)
    assert clip.shape == (6, 3, 48, 64)
    assert clip.dtype == torch.uint8
    assert frame_numbers(clip) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"start": 1.0}, [8, 9, 10, 11]),
        ({"start": 1.01}, [9, 10, 11, 12]),
        ({"frame_interval": 3}, [0, 3, 6, 9]),
        ({"start": 0.5, "end": 1.0}, [4, 5, 6, 7]),
        ({"start": 2.5}, [20, 21, 22, 23]),
        ({"fps": 4}, [0, 2, 4, 6]),
        ({"fps": 16}, [0, 0, 1, 1]),
        ({"fps": 8, "start": 1.0}, [8, 9, 10, 11]),
        ({"fps": 8, "frame_interval": 2, "start": 1.0}, [8, 10, 12, 14]),
        ({"fps": 3, "start": 2.0}, [16, 18, 21]),
        ({"position": 0.0}, [0, 1, 2, 3]),
        ({"position": 0.999999}, [20, 21, 22, 23]),
        ({"position": 0.5}, [10, 11, 12, 13]),
        ({"position": 0.999999, "start": 1.0, "end": 2.0}, [12, 13, 14, 15]),
        ({"position": 0.999999, "fps": 4.0}, [17, 19, 21, 23]),
    ],
    ids=str,
)
def test_frames_are_those_asked_for(
    steady: Path, options: dict[str, float], expected: list[int]
) -> None:
    clip = read_clip(steady, num_frames=len(expected), **options)  # type: ignore[arg-type]
    assert frame_numbers(clip) == expected


def test_every_position_is_taken_equally_often(steady: Path) -> None:
    first = [
        frame_numbers(read_clip(steady, num_frames=20, position=(k + 0.5) / 10))[0]
        for k in range(10)
    ]
    assert first == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_is_read_by_time(tmp_path: Path, suffix: str) -> None:
    times = [0, 40, 80, 500, 900, 940, 980, 1500, 1540, 2000]
    path = make_video(tmp_path / f"vfr{suffix}", 10, times_ms=times, gop=4)
    # On screen at 0, 0.25, ... 1.75 s.
    assert frame_numbers(read_clip(path, num_frames=8, fps=4)) == [0, 2, 3, 3, 6, 6, 7, 8]
    assert frame_numbers(read_clip(path, num_frames=3, fps=4, start=1.0)) == [6, 6, 7]
    assert frame_numbers(read_clip(path, num_frames=4, start=0.9)) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("suffix", "codec", "container"),
    [
        (".mkv", "libx264", None),
        (".ts", "libx264", "mpegts"),
        (".avi", "mpeg4", None),
        (".webm", "libvpx-vp9", None),
    ],
)
@pytest.mark.parametrize("start", [0.0, 0.75, 2.0])
def test_other_containers_seek_rightly(
    tmp_path: Path, suffix: str, codec: str, container: str | None, start: float
) -> None:
    path = make_video(tmp_path / f"v{suffix}", codec=codec, container=container)
    first = int(start * 8)
    clip = read_clip(path, num_frames=4, start=start)
    assert frame_numbers(clip) == [first, first + 1, first + 2, first + 3]


@pytest.mark.parametrize(
    ("suffix", "codec", "container"),
    [
        (".mp4", "libx264", None),
        (".mkv", "libx264", None),
        (".ts", "libx264", "mpegts"),
        (".avi", "mpeg4", None),
    ],
)
def test_a_broken_index_costs_time_but_no_frame(
    tmp_path: Path,
    suffix: str,
    codec: str,
    container: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from longtake.data import video

    path = make_video(tmp_path / f"v{suffix}", codec=codec, container=container)
    seek = video._Video._seek
    monkeypatch.setattr(
        video._Video, "_seek", lambda self, seconds: seek(self, 2.9 if seconds > 0 else seconds)
    )
    assert frame_numbers(read_clip(path, num_frames=4, start=0.75)) == [6, 7, 8, 9]


def quadrants(height: int = 48, width: int = 64) -> np.ndarray:
    """Red, green / blue, white."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2, 0] = 255
    picture[: height // 2, width // 2 :, 1] = 255
    picture[height // 2 :, : width // 2, 2] = 255
    picture[height // 2 :, width // 2 :] = 255
    return picture


def corner_colours(pixels_CHW: torch.Tensor) -> str:
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}
    height, width = pixels_CHW.shape[1:]
    places = [(8, 8), (8, width - 9), (height - 9, 8), (height - 9, width - 9)]
    return "".join(names[tuple((pixels_CHW[:, y, x] > 127).int().tolist())] for y, x in places)


def set_mp4_matrix(path: Path, matrix: tuple[int, ...]) -> None:
    """Writes the display matrix of the first track header (version 0) by hand."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("matrix", "colours", "size"),
    [
        # The matrix that a telephone held upright writes: turn the picture clockwise by 90 degrees.
        ((0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30), "brwg", (64, 48)),
        ((-65536, 0, 0, 0, -65536, 0, 64 << 16, 48 << 16, 1 << 30), "wbgr", (48, 64)),
        ((0, -65536, 0, 65536, 0, 0, 0, 64 << 16, 1 << 30), "gwrb", (64, 48)),
    ],
    ids=["90", "180", "270"],
)
def test_rotation_is_applied(
    tmp_path: Path, matrix: tuple[int, ...], colours: str, size: tuple[int, int]
) -> None:
    path = make_video(tmp_path / "turned.mp4", 4, frames_HWC=[quadrants()] * 4)
    assert corner_colours(read_clip(path, num_frames=1)[0]) == "rgbw"
    set_mp4_matrix(path, matrix)
    clip = read_clip(path, num_frames=1)
    assert tuple(clip.shape[2:]) == size
    assert corner_colours(clip[0]) == colours
    info = probe(path)
    assert (info.height, info.width) == size
    half = Fit(size[0] // 2, size[1] // 2)
    assert corner_colours(read_clip(path, num_frames=1, fit=half)[0]) == colours


def test_pixels_that_are_not_square_become_square(tmp_path: Path) -> None:
    path = make_video(tmp_path / "wide.mp4", 4, aspect=Fraction(2, 1))
    assert read_clip(path, num_frames=1).shape == (1, 3, 48, 128)


def test_odd_sizes_and_one_frame(tmp_path: Path) -> None:
    path = make_video(tmp_path / "odd.mp4", 1, size=(47, 63), pix_fmt="yuv444p")
    assert read_clip(path, num_frames=1).shape == (1, 3, 47, 63)
    assert read_clip(path, num_frames=1, fps=24, fit=Fit(33, 30)).shape == (1, 3, 33, 30)
    assert read_clip(path, num_frames=1, position=0.9).shape == (1, 3, 47, 63)
    with pytest.raises(MediaError, match="1 frames of the 2 needed"):
        read_clip(path, num_frames=2)


def test_sound_does_not_matter(tmp_path: Path) -> None:
    path = make_video(tmp_path / "sound.mp4", 12, audio=True)
    assert frame_numbers(read_clip(path, num_frames=4, start=0.5)) == [4, 5, 6, 7]


def test_a_clip_that_is_too_short_says_by_how_much(steady: Path) -> None:
    with pytest.raises(MediaError, match="24 frames of the 30 needed between 0 s and its end"):
        read_clip(steady, num_frames=MAX_FRAMES)
    with pytest.raises(MediaError, match=r"8 frames of the 9 needed between 1 s and 2 s"):
        read_clip(steady, num_frames=9, start=1.0, end=2.0)
    with pytest.raises(MediaError, match="0 frames of the 1 needed"):
        read_clip(steady, num_frames=1, start=10.0)
    with pytest.raises(MediaError, match="12 frames of the 16 needed"):
        read_clip(steady, num_frames=16, fps=4)


def test_probe_tells_length_and_size(steady: Path) -> None:
    info = probe(steady)
    assert (info.height, info.width, info.num_frames, info.fps) == (48, 64, 24, 8.0)
    assert info.duration == pytest.approx(3.0)
    assert not info.is_image


def test_timestamps_rounded_to_milliseconds_skip_no_frame(tmp_path: Path) -> None:
    path = make_video(tmp_path / "ms.mkv", 24, fps=30)
    assert frame_numbers(read_clip(path, num_frames=24, fps=30)) == list(range(24))


def test_playlists_open_no_other_file(
    tmp_path: Path, steady: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # names in a playlist count from here
    playlist = tmp_path / "list.mp4"
    os.link(steady, tmp_path / steady.name)
    playlist.write_text(f"ffconcat version 1.0\nfile {steady.name}\n")
    import av

    with open(playlist, "rb") as file, av.open(file) as container:
        assert container.format.name == "concat", "FFmpeg itself would follow it"
    assert reason_of(playlist) == "unreadable"


def test_files_that_are_no_media_have_a_reason(tmp_path: Path, steady: Path) -> None:
    def made(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    data = steady.read_bytes()
    playlist = f"ffconcat version 1.0\nfile {steady}\n".encode()
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{steady}\n#EXT-X-ENDLIST\n".encode()
    assert reason_of(made("text.mp4", b"not a video\n" * 100)) == "unreadable"
    assert reason_of(made("garbage.mp4", bytes(range(256)) * 40)) == "unreadable"
    assert reason_of(made("concat.mp4", playlist)) == "unreadable"
    assert reason_of(made("list.ffconcat", playlist)) == "unreadable"
    assert reason_of(made("hls.mp4", hls)) == "unreadable"
    assert reason_of(made("list.m3u8", hls)) == "unreadable"
    assert reason_of(made("half.mp4", data[: len(data) // 2])) in ("unreadable", "too_short")
    assert reason_of(made("empty.mp4", b"")) == "empty"
    assert reason_of(tmp_path / "absent.mp4") == "missing"
    assert reason_of(tmp_path) == "not_a_file"
    os.mkfifo(tmp_path / "pipe.mp4")
    assert reason_of(tmp_path / "pipe.mp4") == "not_a_file"


def test_damaged_files_never_raise_anything_else(tmp_path: Path, steady: Path) -> None:
    data = np.frombuffer(steady.read_bytes(), np.uint8)
    generator = np.random.default_rng(0)
    path = tmp_path / "damaged.mp4"
    for _ in range(40):
        damaged = data.copy()
        places = generator.integers(0, len(data), 20)
        damaged[places] = generator.integers(0, 256, 20)
        path.write_bytes(damaged.tobytes()[: generator.integers(1, len(data))])
        # Any other exception fails the test.
        with contextlib.suppress(MediaError):
            read_clip(path, num_frames=8, start=1.0)
        with contextlib.suppress(MediaError):
            probe(path)


def test_a_file_without_pictures_is_named_so(tmp_path: Path) -> None:
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(MediaError, match="has no video stream; it has: audio"):
        read_clip(path, num_frames=1)


def test_limits_hold(tmp_path: Path, steady: Path) -> None:
    limits = MediaLimits(max_pixels=48 * 64 - 1)
    with pytest.raises(MediaError, match=r"64x48 is more than max_pixels=3071") as caught:
        read_clip(steady, num_frames=1, limits=limits)
    assert caught.value.reason == "too_large"
    one_gop = make_video(tmp_path / "long.mp4", 24, gop=100)
    with pytest.raises(MediaError, match="max_decoded_frames=10"):
        read_clip(one_gop, num_frames=4, start=2.0, limits=MediaLimits(max_decoded_frames=10))
    with pytest.raises(MediaError, match="longer than max_seconds=0") as caught:
        read_clip(steady, num_frames=4, limits=MediaLimits(max_seconds=0.0))
    assert caught.value.reason == "too_slow"


def test_a_header_that_lies_about_its_size_is_bounded(tmp_path: Path) -> None:
    bomb = make_video(
        tmp_path / "bomb.mkv",
        1,
        size=(2048, 2048),
        frames_HWC=[np.zeros((2048, 2048, 3), np.uint8)],
    )
    assert bomb.stat().st_size < 20_000
    assert reason_of(bomb, num_frames=1, limits=MediaLimits(max_pixels=1 << 20)) == "too_large"


def test_media_errors_survive_being_sent_between_processes() -> None:
    import copy

    error = copy.copy(MediaError("a.mp4", "missing", "no such file"))
    assert str(error) == "a.mp4: no such file [missing]"
