"""Filling one micro-batch: which samples, which part of each, and what to do with those that fail.

Letters: B samples, C channels, T frames, H W height and width.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from longtake import randomness
from longtake.data.batch import BadSample, Batch, bad_sample
from longtake.data.config import DataConfig
from longtake.data.files import MediaError
from longtake.data.manifest import Manifest, Sample
from longtake.data.stream import Bucket, Pool, replacement, sample_at
from longtake.data.transforms import Fit, mirror
from longtake.data.video import read_clip
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

    def __init__(self, config: DataConfig, manifest: Manifest) -> None:
        self.config, self.manifest = config, manifest
        # What each worker reads now: (process id, sample id, since when in ms). Shared memory, so
        # that a worker's death or hang can be blamed on a file.
        self.doing = torch.full((max(1, config.num_workers), 3), -1, dtype=torch.int64)
        if config.num_workers:
            self.doing.share_memory_()

    def __getitem__(self, request: Request) -> Any:
        raise NotImplementedError

    def read(
        self, sample_id: int, bucket: Bucket, *, position: float, y: float, x: float, flip: bool
    ) -> tuple[Tensor, Sample]:
        """pixels_CTHW uint8 of exactly the bucket's size."""
        sample = self.manifest[sample_id]
        worker = get_worker_info()
        self.doing[worker.id if worker else 0] = torch.tensor(
            [os.getpid(), sample_id, time.monotonic_ns() // 1_000_000]
        )
        try:
            path = self.manifest.real_path(sample)
            pixels_TCHW = read_clip(
                path,
                num_frames=bucket.num_frames,
                start=sample.start,
                end=sample.end,
                fps=self.config.fps,
                frame_interval=self.config.frame_interval,
                position=position,
                fit=Fit(bucket.height, bucket.width, y, x),
                limits=self.config.limits,
            )
        except MediaError as error:
            # The name the user wrote, not where it led.
            raise MediaError(sample.path, error.reason, error.text) from error
        finally:
            self.doing[worker.id if worker else 0, 1] = -1
        if flip:
            pixels_TCHW = mirror(pixels_TCHW)
        return pixels_TCHW.permute(1, 0, 2, 3), sample


class TrainingReader(Reader):
    """Reads the endless stream; a sample that fails is replaced by another of its pool."""

    def __init__(
        self, config: DataConfig, manifest: Manifest, pools: list[Pool], seed: int
    ) -> None:
        super().__init__(config, manifest)
        self.pools, self.seed = pools, seed

    def __getitem__(self, request: Request) -> Batch | Hopeless:
        bucket, pool = self.config.buckets[request.bucket], self.pools[request.bucket].ids
        slots = [
            sample_at(request.first + k, pool, seed=self.seed, domain=request.bucket)
            for k in range(request.count)
        ]
        pixels_BCTHW = torch.empty(
            (request.count, 3, bucket.num_frames, bucket.height, bucket.width), dtype=torch.uint8
        )
        samples: list[Sample] = []
        bad: list[BadSample] = []
        for k, (epoch, slot_id) in enumerate(slots):
            failed: list[BadSample] = []
            found = self._fill(request.bucket, epoch, slot_id, failed)
            if found is None:
                return Hopeless(request.bucket, bad + failed, len(failed))
            bad += failed
            pixels_BCTHW[k], sample = found
            samples.append(sample)
        epochs, ids = zip(*slots, strict=True)
        return Batch(
            pixels_BCTHW=pixels_BCTHW,
            captions=[sample.caption for sample in samples],
            labels_B=torch.tensor([sample.label for sample in samples]),
            epochs_B=torch.tensor(epochs),
            sample_ids_B=torch.tensor(ids),
            weights_B=torch.ones(request.count),
            bucket=request.bucket,
            bad=bad,
        )

    def _fill(
        self, bucket: int, epoch: int, slot_id: int, failed: list[BadSample]
    ) -> tuple[Tensor, Sample] | None:
        """The slot's own sample, or the first readable replacement; None if there is none."""
        pool = self.pools[bucket].ids
        keys = SampleKeys.single(self.seed, epoch=epoch, sample_id=slot_id)
        draw = {
            stream: randomness.uniform(keys, stream, (2,))[0].tolist()
            for stream in (Stream.CROP_TIME, Stream.CROP_SPACE, Stream.FLIP)
        }
        y, x = draw[Stream.CROP_SPACE] if self.config.crop == "random" else (0.5, 0.5)
        position = draw[Stream.CROP_TIME][0] if self.config.clip_position == "random" else 0.0
        flip = self.config.flip and draw[Stream.FLIP][0] < 0.5
        others = (
            replacement(attempt, pool, seed=self.seed, epoch=epoch, slot_id=slot_id)
            for attempt in range(len(pool))
        )
        candidates = itertools.chain([slot_id], (other for other in others if other != slot_id))
        for sample_id in itertools.islice(candidates, _MAX_ATTEMPTS):
            try:
                return self.read(
                    sample_id,
                    self.config.buckets[bucket],
                    position=position,
                    y=y,
                    x=x,
                    flip=flip,
                )
            except MediaError as error:
                failed.append(bad_sample(sample_id, int(self.manifest.lines[sample_id]), error))
        return None


class ValidationReader(Reader):
    """Reads a fixed list; a sample that fails, and padding behind the list, gets weight 0."""

    def __init__(self, config: DataConfig, manifest: Manifest, ids: np.ndarray) -> None:
        super().__init__(config, manifest)
        self.ids = ids

    def __getitem__(self, request: Request) -> Batch:
        bucket = self.config.buckets[request.bucket]
        pixels_BCTHW = torch.zeros(
            (request.count, 3, bucket.num_frames, bucket.height, bucket.width), dtype=torch.uint8
        )
        weights_B = torch.zeros(request.count)
        labels_B = torch.full((request.count,), -1)
        ids_B = torch.zeros(request.count, dtype=torch.int64)
        captions = [""] * request.count
        bad: list[BadSample] = []
        for k in range(request.count):
            place = request.first + k
            # Padding repeats the last caption and label, so that encoders see ordinary input.
            ids_B[k] = sample_id = int(self.ids[min(place, len(self.ids) - 1)])
            sample = self.manifest[sample_id]
            captions[k], labels_B[k] = sample.caption, sample.label
            if place >= len(self.ids):
                continue
            try:
                pixels_BCTHW[k], _ = self.read(
                    sample_id, bucket, position=0.0, y=0.5, x=0.5, flip=False
                )
                weights_B[k] = 1.0
            except MediaError as error:
                bad.append(bad_sample(sample_id, sample.line, error))
        return Batch(
            pixels_BCTHW=pixels_BCTHW,
            captions=captions,
            labels_B=labels_B,
            epochs_B=torch.zeros(request.count, dtype=torch.int64),
            sample_ids_B=ids_B,
            weights_B=weights_B,
            bucket=request.bucket,
            bad=bad,
        )
