"""A manifest's health: every file opened once, and what the run would make of it."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from longtake.data.batch import BadSample, bad_sample
from longtake.data.config import DataConfig
from longtake.data.files import MediaError
from longtake.data.manifest import Manifest
from longtake.data.stream import Bucket, unsuitable
from longtake.data.transforms import Fit
from longtake.data.video import MediaInfo, probe, read_clip

FITS = ""
_CHUNK = 16


@dataclass(frozen=True)
class SampleHealth:
    """What one row of the manifest is good for."""

    sample_id: int
    path: str
    info: MediaInfo | None
    """None if the file cannot be read at all."""
    bad: BadSample | None
    buckets: tuple[str, ...]
    """For each bucket of the config FITS, or why the sample does not."""
    enlarged: tuple[bool, ...]
    """For each bucket, whether the picture is smaller and would be scaled up."""


@dataclass(frozen=True)
class BucketHealth:
    bucket: Bucket
    num_samples: int
    steps_per_epoch: float
    """Of this bucket: its samples divided by its batch size."""
    num_enlarged: int
    excluded: dict[str, int]
    """Why samples do not suit it -> how many."""


@dataclass(frozen=True)
class ManifestHealth:
    """The whole picture; `samples` are in the manifest's order."""

    manifest: str
    ignored_columns: tuple[str, ...]
    samples: list[SampleHealth]
    buckets: list[BucketHealth]
    reasons: dict[str, int]
    """Reason code -> samples that cannot be read at all."""
    num_images: int
    num_without_caption: int
    num_without_label: int
    num_classes: int
    """One more than the largest label; 0 without labels."""
    seconds: float
    """Of video in all, as far as known."""

    @property
    def bad(self) -> list[BadSample]:
        return [sample.bad for sample in self.samples if sample.bad is not None]


def inspect_manifest(
    config: DataConfig, manifest: Manifest, *, processes: int = 1, max_samples: int | None = None
) -> ManifestHealth:
    """Opens each sample (the first `max_samples`) as training would and reports what is found.

    Every sample is decoded once, for the longest bucket that could take it: who fills that one
    fills the shorter ones too.
    """
    count = len(manifest) if max_samples is None else min(max_samples, len(manifest))
    jobs = [range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
    samples = [sample for chunk in _map(config, manifest, jobs, processes) for sample in chunk]
    labels = manifest.integers["label"][:count]
    infos = [sample.info for sample in samples if sample.info is not None]
    return ManifestHealth(
        manifest=str(manifest.file),
        ignored_columns=manifest.ignored_columns,
        samples=samples,
        buckets=[_bucket_health(config, index, samples) for index in range(len(config.buckets))],
        reasons=dict(Counter(s.bad.reason for s in samples if s.bad is not None).most_common()),
        num_images=sum(info.is_image for info in infos),
        num_without_caption=sum(not manifest.texts["caption"][index] for index in range(count)),
        num_without_label=int((labels < 0).sum()),
        num_classes=int(labels.max(initial=-1)) + 1,
        seconds=sum(info.duration or 0.0 for info in infos),
    )


def _bucket_health(config: DataConfig, index: int, samples: list[SampleHealth]) -> BucketHealth:
    bucket = config.buckets[index]
    verdicts = [sample.buckets[index] for sample in samples]
    fitting = verdicts.count(FITS)
    return BucketHealth(
        bucket=bucket,
        num_samples=fitting,
        steps_per_epoch=fitting / bucket.batch_size,
        num_enlarged=sum(s.enlarged[index] for s in samples if s.buckets[index] == FITS),
        excluded=dict(Counter(verdict for verdict in verdicts if verdict != FITS).most_common()),
    )


def _map(
    config: DataConfig, manifest: Manifest, jobs: list[range], processes: int
) -> Iterator[list[SampleHealth]]:
    inspector = _Inspector(config, manifest)
    if processes <= 1 or len(jobs) <= 1:
        yield from map(inspector, jobs)
        return
    # Forked: the children share the manifest instead of copying it.
    with multiprocessing.get_context("fork").Pool(
        processes, initializer=_start_process, initargs=(inspector,)
    ) as pool:
        yield from pool.imap(_inspect, jobs)


_inspector: _Inspector | None = None


def _start_process(inspector: _Inspector) -> None:
    global _inspector
    _inspector = inspector
    torch.set_num_threads(1)


def _inspect(ids: range) -> list[SampleHealth]:
    assert _inspector is not None
    return _inspector(ids)


class _Inspector:
    def __init__(self, config: DataConfig, manifest: Manifest) -> None:
        self.config, self.manifest, self.limits = config, manifest, config.limits
        self.known = [
            unsuitable(manifest, bucket, fps=config.fps, frame_interval=config.frame_interval)
            for bucket in config.buckets
        ]
        self.order = np.argsort([-bucket.num_frames for bucket in config.buckets], kind="stable")

    def __call__(self, ids: range) -> list[SampleHealth]:
        return [self.inspect(sample_id) for sample_id in ids]

    def inspect(self, sample_id: int) -> SampleHealth:
        sample = self.manifest[sample_id]
        buckets = self.config.buckets
        try:
            path = self.manifest.real_path(sample)
            info = probe(path, limits=self.limits)
        except MediaError as error:
            named = MediaError(sample.path, error.reason, error.text)
            bad = bad_sample(sample_id, sample.line, named)
            reasons = (f"unusable: {error.reason}",) * len(buckets)
            return SampleHealth(sample_id, sample.path, None, bad, reasons, (False,) * len(buckets))
        verdicts = [str(known[sample_id]) for known in self.known]
        filled = 0
        for index in self.order:
            if verdicts[index] != FITS or buckets[index].num_frames <= filled:
                continue
            try:
                read_clip(
                    path,
                    num_frames=buckets[index].num_frames,
                    start=sample.start,
                    end=sample.end,
                    fps=self.config.fps,
                    frame_interval=self.config.frame_interval,
                    fit=Fit(16, 16),  # frames are decoded in full; small pictures save the scaling
                    limits=self.limits,
                )
                filled = buckets[index].num_frames
            except MediaError as error:
                verdicts[index] = error.reason.replace("_", " ")
        enlarged = tuple(
            info.height < bucket.height or info.width < bucket.width for bucket in buckets
        )
        return SampleHealth(sample_id, sample.path, info, None, tuple(verdicts), enlarged)
