from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.data import Bucket, LoaderState, read_manifest
from longtake.data.stream import (
    bucket_of_step,
    eligible,
    replacement,
    sample_at,
    share,
    unsuitable,
)
from tests.data.media import write_jsonl


def test_every_epoch_gives_every_sample_once_in_another_order() -> None:
    pool = np.array([3, 5, 8, 13, 21])
    drawn = [sample_at(position, pool, seed=1, domain=0) for position in range(20)]
    epochs = [[sample for epoch, sample in drawn if epoch == e] for e in range(4)]
    assert all(sorted(epoch) == pool.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = [sample_at(position, pool, seed=2, domain=0) for position in range(20)]
    assert other != drawn


def test_buckets_are_drawn_by_weight() -> None:
    drawn = Counter(bucket_of_step(step, [1.0, 3.0], seed=0) for step in range(2000))
    assert drawn[1] / 2000 == pytest.approx(0.75, abs=0.04)
    assert [bucket_of_step(step, [1.0, 3.0], seed=0) for step in range(9)] == [
        bucket_of_step(step, [1.0, 3.0], seed=0) for step in range(9)
    ]


def test_replacements_try_everything_before_repeating() -> None:
    pool = np.arange(10, 17)
    tried = [replacement(a, pool, seed=0, epoch=2, slot_id=11) for a in range(7)]
    assert sorted(tried) == pool.tolist()
    others = [replacement(a, pool, seed=0, epoch=2, slot_id=12) for a in range(7)]
    later = [replacement(a, pool, seed=0, epoch=3, slot_id=11) for a in range(7)]
    assert others != tried != later


@given(
    size=st.sampled_from([1, 2, 3, 4, 8]),
    micro_batches=st.sampled_from([1, 2, 3]),
    count=st.integers(1, 5),
)
def test_shares_cover_the_batch_in_order(size: int, micro_batches: int, count: int) -> None:
    batch = size * micro_batches * count
    places = [
        place
        for rank in range(size)
        for part in share(batch, rank=rank, size=size, micro_batches=micro_batches)
        for place in part
    ]
    assert places == list(range(batch))


def test_a_batch_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"batch_size=10 .* 4 processes x 2 .*: use 8 or 16"):
        share(10, rank=0, size=4, micro_batches=2)
    with pytest.raises(ValueError, match=r"use 8$"):
        share(3, rank=0, size=4, micro_batches=2)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=3),
    pieces=st.lists(st.integers(1, 7), min_size=1, max_size=4),
)
def test_any_chain_of_resumes_sees_the_same_stream(
    seed: int, weights: list[float], pieces: list[int]
) -> None:
    pools = [np.arange(2 + bucket) for bucket in range(len(weights))]
    sizes = [3 + bucket for bucket in range(len(weights))]

    def walk(state: LoaderState, steps: int) -> tuple[list[tuple[int, int, int]], LoaderState]:
        seen = []
        for _ in range(steps):
            bucket = bucket_of_step(state.step, weights, seed=seed)
            for place in range(sizes[bucket]):
                position = state.consumed[bucket] + place
                seen.append((bucket, *sample_at(position, pools[bucket], seed=seed, domain=bucket)))
            state = state.after(bucket, sizes[bucket])
        return seen, state

    whole, end = walk(LoaderState.beginning(len(weights)), sum(pieces))
    state, parts = LoaderState.beginning(len(weights)), []
    for piece in pieces:
        seen, state = walk(LoaderState.from_json(json.loads(json.dumps(state.to_json()))), piece)
        parts += seen
    assert parts == whole
    assert state == end
    assert len(set(whole)) == len(whole)


@pytest.mark.parametrize(
    "value", [{}, {"step": 1}, {"step": -1, "consumed": [0]}, {"step": 1, "consumed": ["0"]}]
)
def test_a_wrong_state_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a loader state"):
        LoaderState.from_json(value)


def test_samples_known_to_be_too_short_are_left_out(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"path": "unknown.mp4"},
        {"path": "image.png"},
        {"path": "short.mp4", "num_frames": 15, "fps": 24},
        {"path": "enough.mp4", "num_frames": 16, "fps": 24},
        {"path": "range.mp4", "start": 1.0, "end": 1.5, "fps": 24},
        {"path": "long.mp4", "duration": 10.0, "fps": 24},
        {"path": "late.mp4", "duration": 10.0, "fps": 24, "start": 9.8},
        {"path": "seconds.mp4", "duration": 2.0},
    ]
    manifest = read_manifest(write_jsonl(tmp_path / "m.jsonl", rows))
    pool = eligible(manifest, Bucket(num_frames=16), fps=None, frame_interval=1)
    assert pool.ids.tolist() == [0, 3, 5, 7]
    assert pool.excluded == {"an image": 1, "too short by its manifest entry": 3}
    pool = eligible(manifest, Bucket(num_frames=16), fps=8.0, frame_interval=1)
    assert pool.ids.tolist() == [0, 5, 7]
    pool = eligible(manifest, Bucket(num_frames=1), fps=None, frame_interval=1)
    assert pool.ids.tolist() == list(range(8))
    reasons = unsuitable(manifest, Bucket(num_frames=1000), fps=None, frame_interval=1)
    assert reasons[5] == "too short by its manifest entry"


def test_a_bucket_without_samples_says_why(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"path": "a.png"}, {"path": "b.jpg"}]
    rows.append({"path": "c.mp4", "num_frames": 3})
    manifest = read_manifest(write_jsonl(tmp_path / "m.jsonl", rows))
    message = r"no sample of .* \(3 rows\) suits bucket 16x256x256: 2 an image, 1 too short by its"
    with pytest.raises(ValueError, match=message):
        eligible(manifest, Bucket(num_frames=16), fps=None, frame_interval=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 0}, "num_frames=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"weight": 0.0}, "weight=0.0 must be positive"),
    ],
)
def test_a_wrong_bucket_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bucket(**change)
