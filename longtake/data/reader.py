"""Filling one micro-batch: which samples, which part of each, and what replaces those that fail."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from longtake import randomness
from longtake.data.batch import BadSample, Samples, bad_sample
from longtake.data.config import DataConfig
from longtake.data.files import MediaError
from longtake.data.manifest import Manifest
from longtake.data.source import Source, View, place_at, position_of
from longtake.data.stream import Pool, replacement, sample_at
from longtake.randomness import SampleKeys, Stream

_MAX_ATTEMPTS = 32


@dataclass(frozen=True)
class Request:
    """Places first .. first + count of a bucket's stream: all that a worker is told."""

    bucket: int
    first: int
    count: int


@dataclass(frozen=True)
class Hopeless:
    """Sent instead of a batch when every attempt to fill a slot failed."""

    bucket: int
    bad: list[BadSample]
    """All failures of the micro-batch; the last `tries` of them belong to that slot."""
    tries: int


class Reader(Dataset):
    """Turns requests into batches, in whichever process it finds itself."""

    def __init__(self, config: DataConfig, source: Source) -> None:
        self.config, self.source = config, source
        # What each worker reads now: (process id, sample id, since when in ms). Shared memory, so
        # that a worker's death or hang can be blamed on a file.
        self.doing = torch.full((max(1, config.num_workers), 3), -1, dtype=torch.int64)
        if config.num_workers:
            self.doing.share_memory_()

    @property
    def manifest(self) -> Manifest:
        return self.source.manifest

    def __getitem__(self, request: Any) -> Any:
        raise NotImplementedError

    def read(self, sample_id: int, bucket: int, view: View) -> Any:
        """A clip; a MediaError if it cannot be had."""
        worker = get_worker_info()
        self.doing[worker.id if worker else 0] = torch.tensor(
            [os.getpid(), sample_id, time.monotonic_ns() // 1_000_000]
        )
        try:
            return self.source.read(sample_id, bucket, view)
        finally:
            self.doing[worker.id if worker else 0, 1] = -1


class TrainingReader(Reader):
    """Reads the endless stream; a sample that fails is replaced by another of its pool."""

    def __init__(self, config: DataConfig, source: Source, pools: list[Pool], seed: int) -> None:
        super().__init__(config, source)
        self.pools, self.seed = pools, seed

    def __getitem__(self, request: Request) -> Samples | Hopeless:
        pool = self.pools[request.bucket].ids
        slots = [
            sample_at(request.first + k, pool, seed=self.seed, domain=request.bucket)
            for k in range(request.count)
        ]
        clips: list[Any] = []
        sample_ids: list[int] = []
        bad: list[BadSample] = []
        for epoch, slot_id in slots:
            failed: list[BadSample] = []
            found = self._fill(request.bucket, epoch, slot_id, failed)
            if found is None:
                return Hopeless(request.bucket, bad + failed, len(failed))
            bad += failed
            clips.append(found[0])
            sample_ids.append(found[1])
        epochs, slot_ids = zip(*slots, strict=True)
        rows = [self.manifest[sample_id] for sample_id in sample_ids]
        samples = {
            "captions": [row.caption for row in rows],
            "labels_B": torch.tensor([row.label for row in rows]),
            "epochs_B": torch.tensor(epochs),
            "sample_ids_B": torch.tensor(slot_ids),
            "weights_B": torch.ones(request.count),
            "bucket": request.bucket,
            "bad": bad,
        }
        return self.source.batch(request.bucket, clips, samples)

    def _fill(
        self, bucket: int, epoch: int, slot_id: int, failed: list[BadSample]
    ) -> tuple[Any, int] | None:
        """A clip of the slot's own sample, or of the first readable replacement, and whose it is;
        None if there is none."""
        pool, config = self.pools[bucket].ids, self.config
        keys = SampleKeys.single(self.seed, epoch=epoch, sample_id=slot_id)
        draw = {
            stream: randomness.uniform(keys, stream, (2,))[0].tolist()
            for stream in (Stream.CROP_TIME, Stream.CROP_SPACE, Stream.FLIP)
        }
        y, x = draw[Stream.CROP_SPACE] if config.crop == "random" else (0.5, 0.5)
        position = draw[Stream.CROP_TIME][0] if config.clip_position == "random" else 0.0
        if config.clip_places:
            place = place_at(position, config.clip_places)
            position = position_of(place, config.clip_places)
        view = View(position, y, x, config.flip and draw[Stream.FLIP][0] < 0.5)
        others = (
            replacement(attempt, pool, seed=self.seed, epoch=epoch, slot_id=slot_id)
            for attempt in range(len(pool))
        )
        candidates = itertools.chain([slot_id], (other for other in others if other != slot_id))
        for sample_id in itertools.islice(candidates, _MAX_ATTEMPTS):
            try:
                return self.read(sample_id, bucket, view), sample_id
            except MediaError as error:
                failed.append(bad_sample(sample_id, int(self.manifest.lines[sample_id]), error))
        return None


class ValidationReader(Reader):
    """Reads a fixed list; a sample that fails, and padding behind the list, gets weight 0."""

    def __init__(self, config: DataConfig, source: Source, ids: np.ndarray) -> None:
        super().__init__(config, source)
        self.ids = ids

    def __getitem__(self, request: Request) -> Samples:
        bucket = request.bucket
        weights_B = torch.zeros(request.count)
        labels_B = torch.full((request.count,), -1)
        ids_B = torch.zeros(request.count, dtype=torch.int64)
        clips: list[Any] = []
        captions: list[str] = []
        bad: list[BadSample] = []
        for k in range(request.count):
            place = request.first + k
            # Padding repeats the last caption and label, so that encoders see ordinary input.
            ids_B[k] = sample_id = int(self.ids[min(place, len(self.ids) - 1)])
            sample = self.manifest[sample_id]
            captions.append(sample.caption)
            labels_B[k] = sample.label
            if place >= len(self.ids):
                clips.append(self.source.blank(bucket))
                continue
            try:
                clips.append(self.read(sample_id, bucket, View()))
                weights_B[k] = 1.0
            except MediaError as error:
                clips.append(self.source.blank(bucket))
                bad.append(bad_sample(sample_id, sample.line, error))
        samples = {
            "captions": captions,
            "labels_B": labels_B,
            "epochs_B": torch.zeros(request.count, dtype=torch.int64),
            "sample_ids_B": ids_B,
            "weights_B": weights_B,
            "bucket": bucket,
            "bad": bad,
        }
        return self.source.batch(bucket, clips, samples)
