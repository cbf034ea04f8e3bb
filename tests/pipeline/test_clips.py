import json

import pytest
import torch

from longtake.data import read_clip
from longtake.pipeline import write_clips


@pytest.mark.parametrize(("num_frames", "suffix"), [(1, "png"), (4, "mp4")])
def test_clips_and_captions_are_written(tmp_path, num_frames, suffix):
    pixels = torch.tensor([60, 200], dtype=torch.uint8)[:, None, None, None, None]
    videos = pixels.expand(2, 3, num_frames, 32, 48)
    paths = write_clips(tmp_path / "new", videos, ["dark ✓", "bright"], fps=8)
    assert [path.name for path in paths] == [f"000.{suffix}", f"001.{suffix}"]
    back = read_clip(paths[1], num_frames=num_frames).float()
    assert back.shape == (num_frames, 3, 32, 48)
    assert abs(back.mean() - 200) < 4
    listing = json.loads((tmp_path / "new/captions.json").read_text(encoding="utf-8"))
    assert listing == {paths[0].name: "dark ✓", paths[1].name: "bright"}


def test_clips_of_random_encoders_say_so(tmp_path):
    videos = torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8)
    write_clips(tmp_path, videos, ["x"], fps=8, with_random_encoders=True)
    assert "mean nothing" in json.loads((tmp_path / "captions.json").read_text())["warning"]
