"""What the loader hands out: clips with captions, labels and the keys of their randomness."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor

from longtake.data.files import MediaError
from longtake.randomness import SampleKeys


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read."""

    sample_id: int
    path: str
    line: int
    """Of the manifest."""
    reason: str
    text: str

    def __str__(self) -> str:
        # One line, whatever the file or its decoder put into the name or the message.
        text = f"{self.path} (line {self.line}): {self.text} [{self.reason}]"
        return "".join(c if c.isprintable() else "?" for c in text)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What is known of the samples of a micro-batch, whatever their clips are made of."""

    captions: list[str]
    labels_B: Tensor  # int64, NO_LABEL (-1) where the manifest has none
    epochs_B: Tensor  # int64
    sample_ids_B: Tensor  # int64, the slots' ids: a replacement keeps the randomness of its slot
    weights_B: Tensor  # float32, 0 for padding and for held-out samples that could not be read
    bucket: int
    bad: list[BadSample] = field(default_factory=list)
    """Samples that failed and were replaced in this micro-batch."""

    def keys(self, seed: int) -> SampleKeys:
        """Names the samples for drawing random numbers."""
        return SampleKeys(seed, self.epochs_B, self.sample_ids_B)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device; copies from pinned memory do not wait."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self,
            **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)},
        )


@dataclass(frozen=True, kw_only=True)
class Batch(Samples):
    """One micro-batch of pixels. Letters: B samples, C channels, T frames, H W height and width."""

    pixels_BCTHW: Tensor  # uint8 RGB

    @property
    def pixel_size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.pixels_BCTHW.shape[-2:]
        return height, width


class TooManyBadSamples(RuntimeError):
    """So many samples failed that training on the rest would not be what was asked for."""

    def __init__(self, headline: str, bad: Sequence[BadSample]) -> None:
        self.bad = list(bad)
        super().__init__(f"{headline}\n{describe_bad(self.bad)}")


def describe_bad(bad: Iterable[BadSample], *, per_reason: int = 20) -> str:
    """The failed samples, each once, grouped by reason, most frequent first, as indented lines."""
    groups: dict[str, dict[int, BadSample]] = defaultdict(dict)
    for sample in bad:
        groups[sample.reason][sample.sample_id] = sample
    lines = []
    for reason, samples in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"  {reason}: {len(samples)} sample{'s' if len(samples) > 1 else ''}")
        lines += [f"    {sample}" for sample in list(samples.values())[:per_reason]]
        if len(samples) > per_reason:
            lines.append(f"    ... and {len(samples) - per_reason} more")
    return "\n".join(lines)


def bad_sample(sample_id: int, line: int, error: MediaError) -> BadSample:
    return BadSample(sample_id, error.path, line, error.reason, error.text)
