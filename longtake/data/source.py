"""Where readers find clips: here the media files of a manifest; other rooms bring other sources.

A source knows its samples and turns one of them into a clip, and clips into a batch. What is random
about a clip is decided outside, and comes as a `View`.

Letters: B samples, C channels, T frames, H W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from longtake.data.batch import Batch, Samples
from longtake.data.config import DataConfig
from longtake.data.files import MediaError
from longtake.data.manifest import Manifest
from longtake.data.transforms import Fit, mirror
from longtake.data.video import read_clip


@dataclass(frozen=True)
class View:
    """Which part of a sample a clip shows; numbers in [0, 1), from first to last possible place."""

    position: float = 0.0
    """In time."""
    y: float = 0.5
    x: float = 0.5
    flip: bool = False


class Source(Protocol):
    """Samples, and how their clips are read and made into batches."""

    manifest: Manifest

    def read(self, sample_id: int, bucket: int, view: View) -> Any:
        """A clip of a sample.

        Raises:
            MediaError: it cannot be had.
        """
        ...

    def blank(self, bucket: int) -> Any:
        """What stands in a batch where there is no clip; it gets weight 0."""
        ...

    def batch(self, bucket: int, clips: list[Any], samples: Mapping[str, Any]) -> Samples:
        """The clips with the fields of `Samples`; empties the list, to hold few clips twice."""
        ...


class MediaSource:
    """The videos and images that a manifest names; a clip is pixels_CTHW, uint8."""

    def __init__(self, config: DataConfig, manifest: Manifest) -> None:
        self.config, self.manifest = config, manifest

    def read(self, sample_id: int, bucket: int, view: View) -> Tensor:
        """Pixels of exactly the bucket's size.

        Raises:
            MediaError: see `read_clip`; it has the name that the user wrote, not where that led.
        """
        config, shape, sample = self.config, self.config.buckets[bucket], self.manifest[sample_id]
        try:
            pixels_TCHW = read_clip(
                self.manifest.real_path(sample),
                num_frames=shape.num_frames,
                start=sample.start,
                end=sample.end,
                fps=config.fps,
                frame_interval=config.frame_interval,
                position=view.position,
                fit=Fit(shape.height, shape.width, view.y, view.x),
                limits=config.limits,
            )
        except MediaError as error:
            raise MediaError(sample.path, error.reason, error.text) from error
        if view.flip:
            pixels_TCHW = mirror(pixels_TCHW)
        return pixels_TCHW.permute(1, 0, 2, 3)

    def blank(self, bucket: int) -> Tensor:
        """Grey so dark that it is black."""
        shape = self.config.buckets[bucket]
        return torch.zeros((3, shape.num_frames, shape.height, shape.width), dtype=torch.uint8)

    def batch(self, bucket: int, clips: list[Tensor], samples: Mapping[str, Any]) -> Batch:
        pixels_BCTHW = torch.empty((len(clips), *self.blank(bucket).shape), dtype=torch.uint8)
        for place in reversed(range(len(clips))):
            pixels_BCTHW[place] = clips.pop()
        return Batch(pixels_BCTHW=pixels_BCTHW, **samples)


def place_at(position: float, num_places: int) -> int:
    """Which of so many fixed places a random position in [0, 1) falls to."""
    return min(int(position * num_places), num_places - 1)


def position_of(place: int, num_places: int) -> float:
    """Where a fixed place lies in [0, 1]: the first at the beginning, the last at the end."""
    return place / (num_places - 1) if num_places > 1 else 0.0
