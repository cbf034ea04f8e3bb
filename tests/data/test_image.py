from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longtake.data import Fit, MediaError, MediaLimits, probe, read_clip


def ramp(height: int = 24, width: int = 40) -> np.ndarray:
    """Red grows to the right, green downwards."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 255, width)[None]
    picture[..., 1] = np.linspace(0, 255, height)[:, None]
    return picture


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_an_image_is_a_video_of_one_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(ramp()).save(path, quality=95)
    clip = read_clip(path, num_frames=1)
    assert clip.shape == (1, 3, 24, 40)
    expected = torch.from_numpy(ramp()).permute(2, 0, 1).float()
    lossless = suffix.lower() in (".png", ".bmp")
    assert (clip[0].float() - expected).abs().mean() <= (0 if lossless else 4)
    assert probe(path).is_image
    with pytest.raises(MediaError, match="1 frame of the 4 needed: it is an image"):
        read_clip(path, num_frames=4)


def test_camera_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(ramp())
    exif = image.getexif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to view
    image.save(tmp_path / "turned.png", exif=exif)
    clip = read_clip(tmp_path / "turned.png", num_frames=1)
    expected = torch.from_numpy(np.rot90(ramp(), -1).copy()).permute(2, 0, 1)
    assert torch.equal(clip[0], expected)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    layered = np.dstack([ramp(), np.full((24, 40), 255, np.uint8)])
    layered[:, :20, 3] = 0
    Image.fromarray(layered).save(tmp_path / "a.png")
    clip = read_clip(tmp_path / "a.png", num_frames=1)
    assert (clip[..., :20] == 255).all()
    assert torch.equal(clip[0, 0, :, 20:], torch.from_numpy(ramp()[:, 20:, 0].copy()))


def test_palettes_and_grey_pictures_become_rgb(tmp_path: Path) -> None:
    grey = ramp()[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    Image.fromarray(ramp()).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(ramp()).convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name in ("grey.png", "grey16.png"):
        clip = read_clip(tmp_path / name, num_frames=1)
        assert torch.equal(clip[0], torch.from_numpy(grey.copy()).expand(3, -1, -1)), name
    for name in ("palette.png", "cmyk.jpg"):
        assert read_clip(tmp_path / name, num_frames=1).shape == (1, 3, 24, 40)


def test_bad_images_have_a_reason(tmp_path: Path) -> None:
    def reason(name: str, **options: object) -> str:
        with pytest.raises(MediaError) as caught:
            read_clip(tmp_path / name, num_frames=1, **options)  # type: ignore[arg-type]
        return caught.value.reason

    Image.fromarray(ramp()).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no picture")
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "vector.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    frames = [Image.fromarray(ramp()), Image.fromarray(255 - ramp())]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert reason("text.png") == "unreadable"
    assert reason("half.png") == "unreadable"
    assert reason("vector.png") == "unreadable"
    assert reason("moving.webp") == "unsupported"
    assert reason("bomb.png") == "too_large"
    assert reason("good.png", limits=MediaLimits(max_pixels=100)) == "too_large"


def test_fitting_scales_and_cuts(tmp_path: Path) -> None:
    Image.fromarray(ramp(24, 40)).save(tmp_path / "a.png")
    clip = read_clip(tmp_path / "a.png", num_frames=1, fit=Fit(48, 80))
    assert clip.shape == (1, 3, 48, 80)
    # The ramp stays a ramp from end to end.
    assert clip[0, 0, :, 0].max() < 20
    assert clip[0, 0, :, -1].min() > 235
    reds = []
    for x in (0.0, 0.5, 1.0):
        clip = read_clip(tmp_path / "a.png", num_frames=1, fit=Fit(12, 12, 0.5, x))
        assert clip.shape == (1, 3, 12, 12)
        assert clip.is_contiguous()
        reds.append(clip[0, 0].float().mean().item())
    assert reds == pytest.approx([77, 128, 178], abs=8)


def test_a_strip_is_not_blown_up(tmp_path: Path) -> None:
    Image.new("RGB", (5000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(MediaError, match="5000x1 scaled to cover 64x64") as caught:
        read_clip(tmp_path / "strip.png", num_frames=1, fit=Fit(64, 64))
    assert caught.value.reason == "too_large"
