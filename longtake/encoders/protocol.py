"""What an encoder is to the rest of the project: two small protocols and the records they exchange.

A video encoder turns pixels into statistics of latents, not into samples: what is random (the
posterior sample) and what is conventional (scale and shift) happens in `finish`, at training time.
Statistics can therefore be stored once and finished differently in every epoch.

Shapes: B batch, C channels, T frames, H W height and width, L text tokens, K their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentStats:
    """What a video encoder knows about the latents of a batch, before sampling and normalization.

    `logvar_BCTHW` is None where the encoder has no posterior (a transform, a deterministic
    autoencoder).
    """

    mean_BCTHW: Tensor
    logvar_BCTHW: Tensor | None = None


@dataclass(frozen=True)
class PromptEmbeds:
    """Text embeddings padded to the encoder's `max_tokens`; the mask is True on real tokens.

    Padded positions hold zeros. The real tokens of a caption always come first.
    """

    embeds_BLK: Tensor
    mask_BL: Tensor  # bool


class VideoEncoder(Protocol):
    """Pixels to latents and back. Images are clips of one frame."""

    latent_channels: int
    downsample: tuple[int, int, int]
    """Pixels per latent in time, height and width."""
    latent_mean: list[float]
    latent_scale: list[float]
    """Per channel: `finish` gives (posterior sample - mean) * scale, which needs no weights."""
    provenance: dict[str, object]
    """What identifies the encoder (class, source, weights, config, dtype), as plain JSON values."""

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The latents' (C, T, H, W); a ValueError if the encoder cannot take such a clip."""
        ...

    def encode(self, pixels_BCTHW: Tensor) -> LatentStats:
        """Statistics of the latents in the encoder's own units and dtype.

        Pixels are floats in [-1, 1] or bytes, which an encoder turns into floats as it goes: a
        quarter of the memory.
        """
        ...

    def finish(self, stats: LatentStats, noise_BCTHW: Tensor | None = None) -> Tensor:
        """What a transformer sees: a posterior sample (without noise the mean), scaled; float32."""
        ...

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Pixels, float32 in [-1, 1], from latents as `finish` returns them."""
        ...


class TextEncoder(Protocol):
    """Captions to embeddings of a static shape."""

    channels: int
    max_tokens: int
    provenance: dict[str, object]

    def encode(self, captions: Sequence[str]) -> PromptEmbeds:
        """Embeddings (B, max_tokens, channels) and their true lengths; longer captions are cut."""
        ...


def sample_posterior(stats: LatentStats, noise_BCTHW: Tensor | None) -> Tensor:
    """A draw from the diagonal Gaussian posterior, float32; its mean without noise or posterior.

    sample = mean + exp(logvar / 2) * noise
    """
    mean_BCTHW = stats.mean_BCTHW.float()
    if noise_BCTHW is None or stats.logvar_BCTHW is None:
        return mean_BCTHW
    return mean_BCTHW + torch.exp(0.5 * stats.logvar_BCTHW.float()) * noise_BCTHW.float()


def check_pixels(pixels_BCTHW: Tensor) -> None:
    """Raises a ValueError unless the tensor is a batch of RGB clips, floats or bytes."""
    if pixels_BCTHW.ndim != 5 or pixels_BCTHW.shape[1] != 3:
        raise ValueError(
            f"pixels have shape {tuple(pixels_BCTHW.shape)}: "
            "expected (batch, 3, frames, height, width)"
        )
    if not pixels_BCTHW.is_floating_point() and pixels_BCTHW.dtype != torch.uint8:
        raise ValueError(
            f"pixels have dtype {pixels_BCTHW.dtype}: expected floats in [-1, 1], or uint8"
        )


def to_unit_range(pixels: Tensor) -> Tensor:
    """Bytes 0..255 as float32 -1..1; floats as they are."""
    if pixels.is_floating_point():
        return pixels
    return pixels.float().div_(127.5).sub_(1.0)
