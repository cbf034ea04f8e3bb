"""What is read and how it becomes batches: the part of a run's config that belongs to the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from longtake.data.stream import Bucket
from longtake.data.video import MediaLimits


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it becomes batches."""

    manifest: str = ""
    """CSV, JSONL or Parquet file with a column `path`; see `longtake.data.manifest`."""
    store: str = ""
    """Latent store made from this manifest: what it holds is read, the rest is encoded."""
    root: str | None = None
    """Folder that the manifest's paths are relative to; None is the manifest's own."""
    allow_outside_root: bool = False
    """Accept absolute paths, `..` and links that leave the root."""
    buckets: tuple[Bucket, ...] = (Bucket(),)
    fps: float | None = None
    """Frames per second to resample videos to; None takes their own frames."""
    frame_interval: int = 1
    """Take every n-th frame (of `fps`, or of the video's own)."""
    clip_position: Literal["random", "start"] = "random"
    """Where in its range of the video a clip is taken."""
    clip_places: int = 0
    """Random clips are taken at one of so many fixed places, spread from the range's beginning to
    its end; 0: anywhere. A latent store holds fixed places, one (the beginning) if this is 0."""
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    """Mirror half of the samples; wrong for captions that say left and right, and for writing."""
    num_workers: int = 4
    """Processes that decode, per training process; 0 decodes inside the loop."""
    prefetch_batches: int = 2
    """Micro-batches that each worker prepares ahead."""
    worker_timeout_seconds: float = 300.0
    """How long to wait for one micro-batch before the run stops."""
    max_bad_fraction: float = 0.05
    """Share of samples that may fail (and be replaced) before the run stops."""
    bad_grace: int = 64
    """Samples each process reads before that share is looked at."""
    limits: MediaLimits = field(default_factory=MediaLimits)

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ValueError("buckets is empty: at least one bucket is needed")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"fps={self.fps} must be above 0 and at most 1000, or None")
        for name, least in (
            ("frame_interval", 1),
            ("clip_places", 0),
            ("num_workers", 0),
            ("prefetch_batches", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction} must lie in [0, 1]")
        if not self.worker_timeout_seconds > 0:
            raise ValueError(f"worker_timeout_seconds={self.worker_timeout_seconds} must be > 0")
