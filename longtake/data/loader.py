"""From samples to batches, in the order that `stream` defines.

What a batch contains is a function of (seed, step) alone. Workers are told a place in the stream
and nothing else, so neither their number nor the number of processes changes a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longtake.data.batch import BadSample, Samples, TooManyBadSamples
from longtake.data.config import DataConfig
from longtake.data.manifest import Manifest, read_manifest
from longtake.data.reader import Hopeless, Request, TrainingReader, ValidationReader
from longtake.data.source import MediaSource, Source
from longtake.data.stream import LoaderState, Pool, bucket_of_step, eligible, share
from longtake.data.workers import run_workers


def open_manifest(config: DataConfig, manifest: str | Path | None = None) -> Manifest:
    """The config's manifest, or another one (such as the held-out one) read by the same rules."""
    path = manifest or config.manifest
    if not path:
        raise ValueError(
            "data.manifest is not set: give the CSV, JSONL or Parquet file to train on"
        )
    return read_manifest(path, root=config.root, allow_outside_root=config.allow_outside_root)


def build_loader(
    config: DataConfig,
    *,
    seed: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    micro_batches: int = 1,
    start: LoaderState | None = None,
    source: Source | None = None,
    pin_memory: bool = False,
) -> Loader:
    """The endless stream of training steps for one data-parallel rank, from `start` on.

    Clips come from the source; None means the media files of the config's manifest.

    Raises:
        ValueError: the manifest or a bucket has no usable sample, a batch size does not divide
            among the processes and micro-batches, or `start` belongs to other buckets.
    """
    source = MediaSource(config, open_manifest(config)) if source is None else source
    pools = [
        eligible(source.manifest, bucket, fps=config.fps, frame_interval=config.frame_interval)
        for bucket in config.buckets
    ]
    shares = [
        share(bucket.batch_size, rank=dp_rank, size=dp_size, micro_batches=micro_batches)
        for bucket in config.buckets
    ]
    state = LoaderState.beginning(len(config.buckets)) if start is None else start
    if len(state.consumed) != len(config.buckets):
        raise ValueError(
            f"the loader state to resume from has {len(state.consumed)} buckets, the config "
            f"{len(config.buckets)}: resume with the buckets that the run began with"
        )
    return Loader(config, source, pools, shares, seed, state, pin_memory)


class Loader:
    """Iterating yields one optimizer step at a time: the list of this rank's micro-batches.

    `state` is the place after the last step yielded: saved once that step is trained, it resumes
    with the next.
    """

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        pools: list[Pool],
        shares: list[list[range]],
        seed: int,
        state: LoaderState,
        pin_memory: bool,
    ) -> None:
        self.manifest = source.manifest
        self.pools = pools
        self.state = state
        self._config, self._source, self._pin_memory = config, source, pin_memory
        self._shares, self._seed = shares, seed
        self._read = 0
        self._replaced = 0
        self._bad: dict[int, BadSample] = {}

    @property
    def bad(self) -> list[BadSample]:
        """The samples that failed so far in this process, each once, in order of first failure."""
        return list(self._bad.values())

    def __iter__(self) -> Iterator[list[Any]]:
        reader = TrainingReader(self._config, self._source, self.pools, self._seed)
        requests = _requests(self._config, self._shares, self._seed, self.state)
        batches = run_workers(reader, requests, pin_memory=self._pin_memory)
        while True:
            micro_batches = []
            for _ in self._shares[0]:
                batch = next(batches)
                self._count(batch)
                micro_batches.append(batch)
            bucket = micro_batches[0].bucket
            self.state = self.state.after(bucket, self._config.buckets[bucket].batch_size)
            yield micro_batches

    def _count(self, batch: Samples | Hopeless) -> None:
        self._replaced += len(batch.bad)
        for sample in batch.bad:
            self._bad.setdefault(sample.sample_id, sample)
        if isinstance(batch, Hopeless):
            bucket = self._config.buckets[batch.bucket]
            pool = len(self.pools[batch.bucket].ids)
            raise TooManyBadSamples(
                f"no readable sample found for bucket {bucket}: "
                f"{batch.tries} different ones of its {pool} were tried in a row, and all failed",
                batch.bad,
            )
        self._read += len(batch.captions)
        tries = self._read + self._replaced
        fraction, allowed = self._replaced / tries, self._config.max_bad_fraction
        if self._read >= self._config.bad_grace and fraction > allowed:
            raise TooManyBadSamples(
                f"{self._replaced} of {tries} samples read could not be used ({fraction:.1%}), "
                f"more than max_bad_fraction={allowed:g}: repair them or take them out of "
                f"{self.manifest.file} (`longtake doctor --manifest` lists them all)",
                self.bad,
            )


def validation_batches(
    config: DataConfig,
    source: str | Path | Source,
    *,
    batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    bucket: int = 0,
    max_samples: int | None = None,
    pin_memory: bool = False,
) -> ValidationBatches:
    """Held-out samples in their manifest's order: the first clip of each range, centre crop.

    `source` may be the name of a manifest of media files.

    Every process gets equally many batches of `batch_size`, padded with samples of weight 0, so
    that collectives match; over all processes the samples of weight 1 are the same for any
    `dp_size`.

    Raises:
        ValueError: no sample of the manifest suits the bucket.
    """
    if isinstance(source, (str, Path)):
        source = MediaSource(config, open_manifest(config, source))
    pool = eligible(
        source.manifest,
        config.buckets[bucket],
        fps=config.fps,
        frame_interval=config.frame_interval,
    )
    return ValidationBatches(
        config, source, pool.ids[:max_samples], bucket, batch_size, dp_rank, dp_size, pin_memory
    )


class ValidationBatches:
    """Iterating reads the list from its beginning, any number of times."""

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        ids: np.ndarray,
        bucket: int,
        batch_size: int,
        dp_rank: int,
        dp_size: int,
        pin_memory: bool,
    ) -> None:
        self.source, self.manifest = source, source.manifest
        self._reader = ValidationReader(config, source, ids)
        self._pin_memory = pin_memory
        self.num_samples = len(ids)
        count = -(-len(ids) // (batch_size * dp_size))
        first = dp_rank * count
        self._requests = [
            Request(bucket, (first + k) * batch_size, batch_size) for k in range(count)
        ]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Any]:
        yield from run_workers(self._reader, iter(self._requests), pin_memory=self._pin_memory)


def _requests(
    config: DataConfig, shares: list[list[range]], seed: int, state: LoaderState
) -> Iterator[Request]:
    weights = [bucket.weight for bucket in config.buckets]
    while True:
        bucket = bucket_of_step(state.step, weights, seed=seed)
        for places in shares[bucket]:
            yield Request(bucket, state.consumed[bucket] + places.start, len(places))
        state = state.after(bucket, config.buckets[bucket].batch_size)
