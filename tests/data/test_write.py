from __future__ import annotations

from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from longtake.data import contact_sheet, read_clip, write_image, write_video
from tests.data.media import frame_numbers, grey


def frames(count: int, height: int = 48, width: int = 64) -> torch.Tensor:
    values = torch.tensor([grey(index) for index in range(count)], dtype=torch.uint8)
    return values.view(-1, 1, 1, 1).expand(-1, 3, height, width)


@pytest.mark.parametrize("fps", [8, 24, 29.97, 12.5])
def test_a_written_video_reads_back(tmp_path: Path, fps: float) -> None:
    path = tmp_path / "a:b.mp4"
    write_video(path, frames(10), fps)
    assert frame_numbers(read_clip(path, num_frames=10)) == list(range(10))
    assert list(tmp_path.iterdir()) == [path]
    with av.open(str(path.absolute())) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index must come first for streaming"


def test_colours_survive(tmp_path: Path) -> None:
    picture = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    picture[:, 0, :32], picture[:, 1, 32:], picture[:, 2, :, 32:] = 220, 200, 180
    write_video(tmp_path / "a.mp4", picture, 8)
    back = read_clip(tmp_path / "a.mp4", num_frames=4)
    assert (back.float() - picture.float()).abs().mean() < 4


def test_odd_sizes_repeat_their_last_row_and_column(tmp_path: Path) -> None:
    write_video(tmp_path / "odd.mp4", frames(3, 33, 47), 8)
    assert read_clip(tmp_path / "odd.mp4", num_frames=3).shape == (3, 3, 34, 48)
    write_video(tmp_path / "one.mp4", frames(1, 1, 1), 8)
    assert read_clip(tmp_path / "one.mp4", num_frames=1).shape == (1, 3, 2, 2)


def test_wrong_pixels_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torch.float32 \(2, 3, 8, 8\): expected uint8"):
        write_video(tmp_path / "a.mp4", torch.zeros(2, 3, 8, 8), 8)
    with pytest.raises(ValueError, match="are empty"):
        write_video(tmp_path / "a.mp4", torch.zeros(0, 3, 8, 8, dtype=torch.uint8), 8)
    with pytest.raises(ValueError, match="fps=0 must be positive"):
        write_video(tmp_path / "a.mp4", frames(2), 0)
    with pytest.raises(ValueError, match=r"expected uint8 \(3, H, W\)"):
        write_image(tmp_path / "a.png", frames(2))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", fail, raising=False)
    with pytest.raises(OSError, match="disk full"):
        write_video(path, frames(2), 8)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_contact_sheet_shows_first_and_last(tmp_path: Path) -> None:
    sheet = contact_sheet(frames(30, 8, 10), columns=3, max_frames=5)
    assert sheet.shape == (3, 2 * 8 + 4, 3 * 10 + 2 * 4)
    assert sheet[0, 0, 0] == grey(0)
    assert sheet[0, -1, 14] == grey(29)
    assert sheet[0, -1, -1] == 255
    write_image(tmp_path / "s.png", sheet)
    assert Image.open(tmp_path / "s.png").size == (38, 20)
    assert contact_sheet(frames(2)).shape == (3, 48, 132)
