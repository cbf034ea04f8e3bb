from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from longtake.data import Bucket, DataConfig, inspect_manifest, read_manifest
from tests.data.media import make_video, write_jsonl


@pytest.mark.parametrize("processes", [1, 2])
def test_each_sample_is_judged(videos: Path, tmp_path: Path, processes: int) -> None:
    os.link(videos / "v0.mp4", tmp_path / "v0.mp4")
    make_video(tmp_path / "short.mp4", 5)
    (tmp_path / "text.mp4").write_text("text")
    Image.new("RGB", (200, 100)).save(tmp_path / "i.png")
    rows: list[dict[str, object]] = [
        {"path": "v0.mp4", "caption": "a", "label": 4, "extra": 1},
        {"path": "short.mp4", "caption": "b"},
        {"path": "text.mp4"},
        {"path": "i.png"},
        {"path": "absent.mp4"},
        *[{"path": "v0.mp4"} for _ in range(20)],
    ]
    manifest = read_manifest(write_jsonl(tmp_path / "m.jsonl", rows))
    config = DataConfig(
        manifest=str(tmp_path / "m.jsonl"),
        buckets=(
            Bucket(num_frames=1, height=64, width=64, batch_size=23),
            Bucket(num_frames=8, height=32, width=32, batch_size=2),
            Bucket(num_frames=4, height=32, width=32, batch_size=2),
        ),
    )
    health = inspect_manifest(config, manifest, processes=processes)
    assert [sample.sample_id for sample in health.samples] == list(range(25))
    assert health.samples[0].buckets == ("", "", "")
    assert health.samples[0].enlarged == (True, False, False)
    assert health.samples[1].buckets == ("", "too short", "")
    assert health.samples[3].buckets == ("", "an image", "an image")
    assert health.samples[4].buckets == ("unusable: missing",) * 3
    assert health.reasons == {"unreadable": 1, "missing": 1}
    assert [bad.line for bad in health.bad] == [3, 5]
    assert health.buckets[0].num_samples == 23
    assert health.buckets[0].steps_per_epoch == 1.0
    assert health.buckets[0].num_enlarged == 22
    assert health.buckets[1].excluded["too short"] == 1
    assert health.buckets[2].num_samples == 22
    assert health.num_images == 1
    assert health.num_without_caption == 23
    assert health.num_classes == 5
    assert health.ignored_columns == ("extra",)
    assert health.seconds == pytest.approx(21 * 3 + 5 / 8, abs=0.1)
    assert len(inspect_manifest(config, manifest, max_samples=2).samples) == 2
