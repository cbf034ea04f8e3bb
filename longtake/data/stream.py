"""The order of samples, as pure functions: the bucket of each step, the sample of each position.

Nothing here remembers anything. A run's place in the stream is a `LoaderState` of a few integers,
so it resumes at any step, on any number of processes, without a sample lost or repeated: every
bucket's pool is passed through epoch after epoch, and a batch may straddle two of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longtake import randomness
from longtake.data.image import is_image
from longtake.data.manifest import Manifest
from longtake.randomness import SampleKeys, Stream


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One shape of clip, and how often and in what batches it is trained."""

    num_frames: int = 16
    """1 takes images, and single frames of videos."""
    height: int = 256
    """Pixels."""
    width: int = 256
    """Pixels."""
    weight: float = 1.0
    """How often a step takes this bucket, relative to the others."""
    batch_size: int = 8
    """Samples per optimizer step, all processes together."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"bucket {name}={getattr(self, name)} must be at least 1")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"bucket weight={self.weight} must be positive and finite")

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class LoaderState:
    """A place in the stream: the next step, and the samples each bucket has given before it."""

    step: int
    consumed: tuple[int, ...]

    @classmethod
    def beginning(cls, num_buckets: int) -> LoaderState:
        return cls(0, (0,) * num_buckets)

    def to_json(self) -> dict[str, object]:
        return {"step": self.step, "consumed": list(self.consumed)}

    @classmethod
    def from_json(cls, value: dict[str, object]) -> LoaderState:
        """Raises ValueError if `value` is not what `to_json` wrote."""
        step, consumed = value.get("step"), value.get("consumed")
        if (
            not isinstance(consumed, list)
            or not consumed
            or not all(type(count) is int and count >= 0 for count in [step, *consumed])
        ):
            raise ValueError(f"not a loader state: {value!r:.200}")
        assert isinstance(step, int)
        return cls(step, tuple(consumed))

    def after(self, bucket: int, count: int) -> LoaderState:
        """The place one step of `count` samples of `bucket` later."""
        consumed = list(self.consumed)
        consumed[bucket] += count
        return LoaderState(self.step + 1, tuple(consumed))


def bucket_of_step(step: int, weights: Sequence[float], *, seed: int) -> int:
    """Which bucket a step takes, drawn by weight."""
    if len(weights) == 1:
        return 0
    draw = randomness.uniform(SampleKeys.single(seed, sample_id=step), Stream.BUCKET).item()
    ends = np.cumsum(weights)
    return min(int(np.searchsorted(ends, draw * ends[-1], side="right")), len(weights) - 1)


def sample_at(position: int, pool: np.ndarray, *, seed: int, domain: int) -> tuple[int, int]:
    """(epoch, sample id) at a position of a bucket's stream; `domain` is the bucket's index."""
    epoch, index = divmod(position, len(pool))
    return epoch, int(
        pool[randomness.permuted(index, len(pool), seed=seed, epoch=epoch, domain=domain)]
    )


def replacement(attempt: int, pool: np.ndarray, *, seed: int, epoch: int, slot_id: int) -> int:
    """The sample to try instead when sample `slot_id` of an epoch cannot be read.

    Attempts 0, 1, ... run through a permutation of the pool that belongs to the slot, so every
    process and every replay tries the same ones, and all are tried before one comes again.
    """
    slot_seed = randomness.named_seed(seed, f"replacement/{slot_id}")
    return int(pool[randomness.permuted(attempt, len(pool), seed=slot_seed, epoch=epoch)])


def share(batch_size: int, *, rank: int, size: int, micro_batches: int) -> list[range]:
    """Places in the global batch that rank `rank` of `size` takes, one range per micro-batch.

    Raises:
        ValueError: the batch does not divide.
    """
    parts = size * micro_batches
    if batch_size % parts:
        lower = batch_size // parts * parts
        near = " or ".join(str(n) for n in (lower, lower + parts) if n)
        raise ValueError(
            f"batch_size={batch_size} does not divide into {size} processes x {micro_batches} "
            f"micro-batches: use {near}"
        )
    count = batch_size // parts
    first = rank * micro_batches * count
    return [range(first + m * count, first + (m + 1) * count) for m in range(micro_batches)]


def unsuitable(
    manifest: Manifest, bucket: Bucket, *, fps: float | None, frame_interval: int
) -> np.ndarray:
    """Why each sample cannot fill the bucket, as far as the manifest tells; "" if it can.

    Lengths that the manifest does not give are not held against a sample: its file will be read and
    tell.
    """
    count = len(manifest)
    reasons = np.full(count, "", dtype=object)
    if bucket.num_frames == 1:
        return reasons
    seconds, frames = manifest.seconds, manifest.integers["num_frames"].astype(np.float64)
    frames[frames < 0] = np.nan
    length = np.where(np.isnan(seconds["duration"]), frames / seconds["fps"], seconds["duration"])
    start = np.nan_to_num(seconds["start"])
    # fmin ignores what is not given; both missing stays nan, and nan compares as "not too short".
    available = np.fmin(seconds["end"], length) - start
    own_fps = np.where(np.isnan(seconds["fps"]), frames / seconds["duration"], seconds["fps"])
    steps = (bucket.num_frames - 1) * frame_interval
    # Half a frame of grace: rounding of headers must not cost a sample.
    grace = np.where(np.isnan(own_fps), 0.1, 0.5 / own_fps)
    needed = steps / fps if fps is not None else (steps + 1) / own_fps
    reasons[available + grace < needed] = "too short by its manifest entry"
    if fps is None:
        reasons[frames < steps + 1] = "too short by its manifest entry"
    images = np.fromiter((is_image(path) for path in manifest.texts["path"]), bool, count)
    reasons[images] = "an image"
    return reasons


@dataclass(frozen=True)
class Pool:
    """The samples that may fill a bucket."""

    ids: np.ndarray  # int64, indices into the manifest
    excluded: dict[str, int]
    """Reason -> number of samples."""


def eligible(manifest: Manifest, bucket: Bucket, *, fps: float | None, frame_interval: int) -> Pool:
    """The bucket's pool.

    Raises:
        ValueError: it is empty.
    """
    reasons = unsuitable(manifest, bucket, fps=fps, frame_interval=frame_interval)
    excluded = dict(Counter(reason for reason in reasons if reason))
    ids = np.flatnonzero(reasons == "")
    if not len(ids):
        why = ", ".join(f"{number} {reason}" for reason, number in excluded.items())
        raise ValueError(
            f"no sample of {manifest.file} ({len(manifest)} rows) suits bucket {bucket}: {why}. "
            "Use fewer frames, a higher fps or a smaller frame_interval, or add longer videos"
        )
    return Pool(ids, excluded)
