from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from longtake.data import (
    Batch,
    Bucket,
    DataConfig,
    LoaderError,
    LoaderState,
    MediaError,
    TooManyBadSamples,
    build_loader,
    validation_batches,
    write_video,
)
from longtake.data import source as source_module
from tests.data.media import frame_numbers, make_video, write_jsonl

SMALL = Bucket(num_frames=4, height=32, width=32, batch_size=4)


@pytest.fixture
def config(videos: Path) -> DataConfig:
    return DataConfig(
        manifest=str(videos / "manifest.jsonl"),
        buckets=(SMALL,),
        crop="random",
        flip=True,
        num_workers=0,
    )


def take(config: DataConfig, steps: int, **options: object) -> list[list[Batch]]:
    options = {"seed": 7, **options}
    return list(itertools.islice(build_loader(config, **options), steps))  # type: ignore[arg-type]


def flat(steps: Iterable[list[Batch]]) -> dict[str, list[torch.Tensor]]:
    """All samples of a run in order, whatever the micro-batches."""
    batches = [batch for step in steps for batch in step]
    return {
        name: [row for batch in batches for row in getattr(batch, name)]
        for name in ("pixels_BCTHW", "labels_B", "epochs_B", "sample_ids_B")
    }


def assert_same(left: Iterable[list[Batch]], right: Iterable[list[Batch]]) -> None:
    first, second = flat(left), flat(right)
    for name in first:
        assert len(first[name]) == len(second[name])
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True)), name


def test_a_step_is_what_the_config_says(config: DataConfig) -> None:
    (step,) = take(config, 1, micro_batches=2)
    assert [batch.pixels_BCTHW.shape for batch in step] == [(2, 3, 4, 32, 32)] * 2
    batch = step[0]
    assert batch.pixels_BCTHW.dtype == torch.uint8
    assert batch.captions == [f"clip {label}" for label in batch.labels_B.tolist()]
    assert batch.labels_B.tolist() == batch.sample_ids_B.tolist()
    assert batch.weights_B.tolist() == [1.0, 1.0]
    assert batch.bad == []
    assert batch.keys(7).sample_ids_B is batch.sample_ids_B
    assert torch.equal(batch.to("cpu").pixels_BCTHW, batch.pixels_BCTHW)


def test_the_number_of_workers_changes_nothing(config: DataConfig) -> None:
    none = take(config, 4)
    for workers in (1, 2):
        assert_same(take(dataclasses.replace(config, num_workers=workers), 4), none)


def test_the_number_of_processes_changes_nothing(config: DataConfig) -> None:
    one = take(config, 4)
    for size in (2, 4):
        ranks = [take(config, 4, dp_rank=rank, dp_size=size) for rank in range(size)]
        together = [[batch for rank in ranks for batch in rank[step]] for step in range(4)]
        assert_same(together, one)
    assert_same(take(config, 4, micro_batches=4), one)


def test_resuming_anywhere_continues_the_stream(config: DataConfig) -> None:
    whole = take(config, 6)  # 24 samples: almost five epochs of five
    for cut in (1, 3, 5):
        loader = build_loader(config, seed=7)
        for _ in itertools.islice(loader, cut):
            pass
        state = LoaderState.from_json(json.loads(json.dumps(loader.state.to_json())))
        assert state == LoaderState(cut, (4 * cut,))
        assert_same(take(config, 6 - cut, start=state), whole[cut:])


def test_the_state_ignores_what_was_only_prefetched(config: DataConfig) -> None:
    loader = build_loader(dataclasses.replace(config, num_workers=2), seed=7)
    next(iter(loader))
    assert loader.state == LoaderState(1, (4,))


def test_a_batch_may_be_larger_than_the_data_set(config: DataConfig) -> None:
    bucket = dataclasses.replace(SMALL, batch_size=12)
    (step,) = take(dataclasses.replace(config, buckets=(bucket,)), 1)
    assert step[0].epochs_B.tolist() == [0] * 5 + [1] * 5 + [2] * 2
    assert sorted(step[0].sample_ids_B.tolist()[:5]) == [0, 1, 2, 3, 4]


def test_buckets_take_turns_and_keep_their_own_place(config: DataConfig) -> None:
    still = Bucket(num_frames=1, height=16, width=24, batch_size=2)
    mixed = dataclasses.replace(config, buckets=(SMALL, still))
    loader = build_loader(mixed, seed=7)
    steps = list(itertools.islice(loader, 8))
    buckets = [step[0].bucket for step in steps]
    assert set(buckets) == {0, 1}
    assert loader.state == LoaderState(8, (4 * buckets.count(0), 2 * buckets.count(1)))
    assert steps[buckets.index(1)][0].pixels_BCTHW.shape == (2, 3, 1, 16, 24)
    with pytest.raises(ValueError, match="has 1 buckets, the config 2"):
        build_loader(mixed, seed=7, start=LoaderState(3, (12,)))


def test_augmentation_differs_by_epoch_and_seed(config: DataConfig) -> None:
    (step,) = take(
        dataclasses.replace(config, buckets=(dataclasses.replace(SMALL, batch_size=10),)), 1
    )
    by_slot = {
        (epoch, sample): pixels
        for epoch, sample, pixels in zip(
            step[0].epochs_B.tolist(),
            step[0].sample_ids_B.tolist(),
            step[0].pixels_BCTHW,
            strict=True,
        )
    }
    assert any(not torch.equal(by_slot[0, k], by_slot[1, k]) for k in range(5))
    assert not torch.equal(
        take(config, 1)[0][0].pixels_BCTHW, take(config, 1, seed=8)[0][0].pixels_BCTHW
    )


def test_center_crop_from_the_start_has_no_randomness(config: DataConfig) -> None:
    plain = dataclasses.replace(config, crop="center", flip=False, clip_position="start")
    first, second = (flat(take(plain, 5, seed=seed)) for seed in (1, 2))
    of_first = dict(zip(map(int, first["sample_ids_B"]), first["pixels_BCTHW"], strict=True))
    for sample, pixels in zip(
        map(int, second["sample_ids_B"]), second["pixels_BCTHW"], strict=True
    ):
        assert torch.equal(of_first[sample], pixels)


def test_fixed_places_are_spread_from_beginning_to_end(config: DataConfig) -> None:
    # 24 frames of video leave a clip of 4 frames 21 places.
    expected = {1: {0}, 2: {0, 20}, 3: {0, 10, 20}, 40: set(range(21))}
    for places, wanted in expected.items():
        fixed = dataclasses.replace(config, clip_places=places)
        firsts = {
            frame_numbers(pixels.transpose(0, 1))[0]
            for pixels in flat(take(fixed, 12))["pixels_BCTHW"]
        }
        assert firsts <= wanted
        assert len(firsts) == len(wanted) or places == 40
        assert max(firsts) == max(wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_left_alone(config: DataConfig, workers: int) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    take(dataclasses.replace(config, num_workers=workers), 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[index]


@pytest.fixture
def spoilt(videos: Path, tmp_path: Path) -> DataConfig:
    """Three good samples and three bad ones."""
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    make_video(tmp_path / "short.mp4", 2)
    names = ["v0.mp4", "text.mp4", "v1.mp4", "short.mp4", "v2.mp4", "absent.mp4"]
    for name in names[::2]:
        os.link(videos / name, tmp_path / name)
    rows: list[dict[str, object]] = [{"path": name, "caption": name} for name in names]
    return DataConfig(
        manifest=str(write_jsonl(tmp_path / "m.jsonl", rows)),
        buckets=(dataclasses.replace(SMALL, batch_size=6),),
        num_workers=0,
        max_bad_fraction=1.0,
        bad_grace=0,
    )


def test_bad_samples_are_replaced_the_same_way_everywhere(spoilt: DataConfig) -> None:
    whole = take(spoilt, 3)
    assert_same(take(dataclasses.replace(spoilt, num_workers=2), 3), whole)
    ranks = [take(spoilt, 3, dp_rank=rank, dp_size=3) for rank in range(3)]
    together = [[batch for rank in ranks for batch in rank[step]] for step in range(3)]
    assert_same(together, whole)
    assert_same(take(spoilt, 2, start=LoaderState(1, (6,))), whole[1:])
    for (batch,) in whole:
        assert batch.pixels_BCTHW.shape[0] == 6
        assert set(batch.captions) <= {"v0.mp4", "v1.mp4", "v2.mp4"}
        # One step is one epoch here: all slots are there, and each bad sample failed in its own.
        assert sorted(batch.sample_ids_B.tolist()) == list(range(6))
        assert {(bad.path, bad.line, bad.reason) for bad in batch.bad} == {
            ("text.mp4", 2, "unreadable"),
            ("short.mp4", 4, "too_short"),
            ("absent.mp4", 6, "missing"),
        }


def test_too_many_bad_samples_stop_the_run_with_the_list(spoilt: DataConfig) -> None:
    config = dataclasses.replace(spoilt, max_bad_fraction=0.2)
    with pytest.raises(TooManyBadSamples) as caught:
        take(config, 100)
    text = str(caught.value)
    assert "more than max_bad_fraction=0.2" in text
    for part in (
        "missing: 1 sample\n",
        "absent.mp4 (line 6): no such file",
        "2 frames of the 4 need",
    ):
        assert part in text
    assert {bad.path for bad in caught.value.bad} == {"text.mp4", "short.mp4", "absent.mp4"}
    assert len(caught.value.bad) == 3, "each is listed once"
    # The grace keeps a single unlucky batch from ending the run.
    take(dataclasses.replace(config, bad_grace=1000), 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pool_of_bad_samples_only_stops_the_run(tmp_path: Path, workers: int) -> None:
    rows: list[dict[str, object]] = [{"path": f"{k}.mp4"} for k in range(3)]
    config = DataConfig(
        manifest=str(write_jsonl(tmp_path / "m.jsonl", rows)),
        buckets=(SMALL,),
        num_workers=workers,
        max_bad_fraction=1.0,
    )
    message = r"(?s)no readable sample found for bucket 4x32x32.*missing: 3 samples.*2\.mp4"
    with pytest.raises(TooManyBadSamples, match=message):
        take(config, 1)


def test_settings_that_cannot_work_are_refused(config: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"data\.manifest is not set"):
        build_loader(DataConfig(), seed=0)
    with pytest.raises(ValueError, match="batch_size=4 does not divide into 3 processes"):
        build_loader(config, seed=0, dp_rank=0, dp_size=3)
    for change, message in [
        ({"buckets": ()}, "buckets is empty"),
        ({"fps": 0.0}, "fps=0.0 must be above 0"),
        ({"frame_interval": 0}, "frame_interval=0 must be at least 1"),
        ({"clip_places": -1}, "clip_places=-1 must be at least 0"),
        ({"max_bad_fraction": 2.0}, r"max_bad_fraction=2.0 must lie in \[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **change)


def test_a_worker_that_dies_is_named_with_its_file(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: Path, **_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(source_module, "read_clip", die)
    config = dataclasses.replace(config, num_workers=1, worker_timeout_seconds=20.0)
    with pytest.raises(LoaderError, match=r"data worker \(process \d+\).*while reading 'v\d.mp4'"):
        take(config, 1)


def test_a_worker_that_hangs_is_named_with_its_file(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setattr(source_module, "read_clip", lambda path, **_: time.sleep(100))
    config = dataclasses.replace(config, num_workers=1, worker_timeout_seconds=1.0)
    with pytest.raises(LoaderError, match=r"worker_timeout_seconds=1.*reading 'v\d.mp4' \(process"):
        take(config, 1)


def test_other_errors_pass_unchanged(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, **_: object) -> None:
        raise RuntimeError("our own mistake")

    monkeypatch.setattr(source_module, "read_clip", fail)
    with pytest.raises(RuntimeError, match="our own mistake"):
        take(config, 1)


def test_validation_is_the_same_list_for_any_number_of_processes(config: DataConfig) -> None:
    def collect(**options: int) -> list[tuple[int, bytes]]:
        batches = validation_batches(config, config.manifest, **options)  # type: ignore[arg-type]
        return [
            (int(sample), pixels.numpy().tobytes())
            for batch in batches
            for sample, pixels, weight in zip(
                batch.sample_ids_B, batch.pixels_BCTHW, batch.weights_B, strict=True
            )
            if weight
        ]

    whole = collect(batch_size=2)
    assert [sample for sample, _ in whole] == [0, 1, 2, 3, 4]
    assert collect(batch_size=3) == whole
    assert (
        collect(batch_size=2, dp_size=2, dp_rank=0) + collect(batch_size=2, dp_size=2, dp_rank=1)
        == whole
    )
    sizes = {
        len(validation_batches(config, config.manifest, batch_size=2, dp_size=4, dp_rank=rank))
        for rank in range(4)
    }
    assert sizes == {1}
    assert collect(batch_size=2, max_samples=3) == whole[:3]
    batches = validation_batches(config, config.manifest, batch_size=4)
    assert len(batches) == len(list(batches)) == len(list(batches)) == 2
    assert batches.num_samples == 5


def test_a_held_out_sample_that_fails_counts_nothing(spoilt: DataConfig) -> None:
    (batch,) = validation_batches(spoilt, spoilt.manifest, batch_size=6)
    assert batch.weights_B.tolist() == [1, 0, 1, 0, 1, 0]
    assert [bad.sample_id for bad in batch.bad] == [1, 3, 5]
    assert batch.captions[1] == "text.mp4"


def test_bad_records_are_one_safe_line() -> None:
    from longtake.data.batch import bad_sample

    record = bad_sample(3, 4, MediaError("a\x1b[31m.mp4", "unreadable", "line\nbreak"))
    assert str(record) == "a?[31m.mp4 (line 4): line?break [unreadable]"


def test_workers_decode_after_the_parent_used_a_threaded_scaler(tmp_path):
    """A scaler's threads do not survive a fork; workers must not wait for the parent's."""
    clip = tmp_path / "clip.mp4"
    write_video(clip, torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8), fps=8)
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text('{"path": "clip.mp4"}\n')
    with av.open(str(clip)) as container:
        for frame in container.decode(video=0):
            frame.reformat(width=32, height=32, format="rgb24", threads=4)
    config = DataConfig(
        manifest=str(manifest),
        buckets=(Bucket(num_frames=4, height=32, width=32, batch_size=2),),
        num_workers=2,
        worker_timeout_seconds=20,
    )
    batches = next(iter(build_loader(config, seed=0)))
    assert batches[0].pixels_BCTHW.shape == (2, 3, 4, 32, 32)
