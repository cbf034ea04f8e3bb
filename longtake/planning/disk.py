"""What it takes to keep the encoded clips and captions of a data set.

Letters: C channels, T frames, H W height and width of a latent; K width of a text token.

    latents per clip   fp32 sample       4 C T H W
                       bf16 statistics   2 C T H W          once, or twice with the log-variance
                       8-bit statistics  C T H W + 8 C T    the same
    text per caption   2 K · tokens
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from longtake.planning.sizes import size_text

LatentForm = Literal["fp32", "bf16", "8bit"]
FORMS: dict[LatentForm, str] = {
    "fp32": "fp32 sample",
    "bf16": "bf16 statistics",
    "8bit": "8-bit statistics",
}
_TEXT_BYTES = 2  # fp16 or bf16
_RANGE_BYTES = 8  # lowest value and step, fp32, of every channel and frame


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """A data set's encodings, and how they are kept."""

    clips: int
    latent: tuple[int, int, int, int]  # C, T, H, W
    form: LatentForm
    with_posterior: bool = True
    """Whether the autoencoder gives a log-variance beside the mean."""
    variants: int = 1
    """Places in time, times two if the mirrored side is kept, too."""
    captions: int
    """Different ones."""
    tokens: float
    """That are kept of a caption, on average."""
    max_tokens: int = 120
    text_channels: int = 4096
    """0: no text is kept."""
    replicas: int = 1

    def __post_init__(self) -> None:
        for name in ("clips", "variants", "captions", "max_tokens", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if min(self.latent) < 1:
            raise ValueError(f"latent={text_of_shape(self.latent)}: every size must be at least 1")
        if self.text_channels < 0:
            raise ValueError(f"text_channels={self.text_channels} must not be negative")
        if not 0 < self.tokens <= self.max_tokens:
            raise ValueError(
                f"tokens={self.tokens:g} must be above 0 and at most max_tokens={self.max_tokens}"
            )

    @property
    def clip_bytes(self) -> int:
        """Of one clip's latents, in one place and on one side."""
        values = math.prod(self.latent)
        if self.form == "fp32":
            return 4 * values
        channels, frames = self.latent[:2]
        one = 2 * values if self.form == "bf16" else values + _RANGE_BYTES * channels * frames
        return one * (2 if self.with_posterior else 1)

    @property
    def caption_bytes(self) -> float:
        """Of one caption's embedding, on average."""
        return _TEXT_BYTES * self.text_channels * self.tokens

    @property
    def latent_total(self) -> int:
        return self.replicas * self.clips * self.variants * self.clip_bytes

    @property
    def text_total(self) -> float:
        return self.replicas * self.captions * self.caption_bytes

    @property
    def total(self) -> float:
        """Bytes, all replicas together."""
        return self.latent_total + self.text_total


def text_of_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def mean_tokens(lengths: Mapping[int, float], max_tokens: int) -> float:
    """The tokens kept of a caption on average; `lengths` says how frequent each true length is.

    Raises:
        ValueError: a length below 1, or no frequency above 0.
    """
    weight = sum(lengths.values())
    if not weight > 0 or min(lengths.values()) < 0:
        raise ValueError("caption lengths need frequencies of which one is above 0 and none below")
    if min(lengths) < 1:
        raise ValueError(f"a caption of {min(lengths)} tokens: the shortest has 1, its end")
    return sum(min(length, max_tokens) * share for length, share in lengths.items()) / weight


def alternatives(plan: DiskPlan, true_tokens: float | None) -> list[DiskPlan]:
    """The same clips in every form, text padded and, if its length is known, not."""
    lengths = [float(plan.max_tokens)]
    if true_tokens is not None and true_tokens < plan.max_tokens:
        lengths.append(true_tokens)
    if not plan.text_channels:
        lengths = [plan.tokens]
    return [replace(plan, form=form, tokens=tokens) for tokens in lengths for form in FORMS]


def assumptions(plan: DiskPlan, true_tokens: float | None) -> list[str]:
    """What a total takes for granted, and what it would be otherwise; one sentence or two each."""

    def total(**change: object) -> str:
        return size_text(replace(plan, **change).total)  # type: ignore[arg-type]

    lines = []
    if plan.form == "fp32":
        lines += [
            "fp32: encoders on a GPU compute in bf16, so half of these bytes hold nothing. The "
            f"same sample in bf16: {size_text(plan.total - plan.latent_total / 2)}.",
            "A sample, drawn from the autoencoder's posterior once: every epoch sees the same "
            "noise in it. Its mean and log-variance, from which each epoch draws anew: "
            f"{total(form='bf16')} in bf16, {total(form='8bit')} in 8 bits.",
        ]
    if plan.text_channels:
        if plan.tokens == plan.max_tokens:
            text = f"Every caption is taken to have {plan.max_tokens} tokens. "
            if true_tokens is None:
                few = max(1, plan.max_tokens // 3)
                text += f"At true length with {few} on average: {total(tokens=few)}."
            else:
                text += f"At their true length of {true_tokens:.0f}: {total(tokens=true_tokens)}."
            lines.append(text)
        if plan.captions == plan.clips:
            lines.append("Every clip has a caption of its own; equal ones are kept once.")
    if plan.variants == 1:
        lines.append(
            "Every clip is taken at one place of its video and on one side. With its mirrored "
            f"side: {total(variants=2)}; at four places with both: {total(variants=8)}."
        )
    if plan.replicas == 1:
        lines.append(
            f"One copy on one disk. Two: {total(replicas=2)}. A file system wants a tenth free."
        )
    lines.append(
        "Not counted: names and checksums (a latent store's headers and index are under 1 kB a "
        "clip, beside the captions themselves), and the videos."
    )
    return lines
