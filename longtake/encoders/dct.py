"""A video encoder without weights: the block DCT of each frame. A transform, not a learned VAE.

Each frame goes to an orthonormal luma/chroma colour space and through an orthonormal block DCT, as
in JPEG; the low-frequency coefficients of a block become the channels of one latent. Nothing is
learned or downloaded, so it serves tests, benchmarks and the quickstart. With all coefficients kept
the transform is exactly invertible; with fewer it is the orthogonal projection on the smooth part
of the frame.

Shapes: B batch, C latent channels, T frames, H W height and width, P = 3·block·block values of a
pixel block.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from longtake.encoders.protocol import (
    LatentStats,
    check_pixels,
    sample_posterior,
    to_unit_range,
)

# Rows: luma, red-blue, green-magenta. Orthonormal, so that energy in pixels is energy in
# coefficients.
_COLOUR = (
    (1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)),
    (1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)),
    (1 / math.sqrt(6), -2 / math.sqrt(6), 1 / math.sqrt(6)),
)

# The coefficients' standard deviations, per colour row, for pixels in [-1, 1]:
#   block mean:  level * block
#   otherwise:   amplitude * frequency ** -slope, in cycles per pixel: hypot(u, v) / (2 * block)
# Natural images have amplitude spectra close to a power law (Field, JOSA A 4, 1987), and an
# orthonormal DCT samples that spectrum whatever its block size, so one law serves all. The
# constants are a least-squares fit of log std on the clips bikes, bigbuckbunny and carphone at 64,
# 96 and 128 pixels height, blocks of 4 and 8 together.
_LEVEL = (0.67, 0.19, 0.126)
_AMPLITUDE = (0.0223, 0.00306, 0.00268)
_SLOPE = (1.62, 1.78, 1.68)


class DctEncoder:
    """Block-DCT transform encoder: `block` pixels down in space, none in time; deterministic.

    Channels are the first `luma_channels` coefficients of the luma in zig-zag order, then the first
    `chroma_channels` of each of the two chroma components.

    `finish` divides each by std ** whitening, where std is the deviation that natural images have
    there (see the law above), and all of them by one number that brings the mean variance to one.
    whitening = 1 gives every channel unit variance; whitening = 0 keeps the spectrum of images, as
    if one diffused pixels: noise then hides detail long before it hides the picture, so that a
    model settles the large forms first, and the loss weighs errors as the eye does.
    """

    def __init__(
        self,
        *,
        block: int = 8,
        luma_channels: int = 16,
        chroma_channels: int = 4,
        whitening: float = 1.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if block < 2:
            raise ValueError(f"dct_block={block} must be at least 2: use 4 or 8")
        for name, count, least in (("luma", luma_channels, 1), ("chroma", chroma_channels, 0)):
            if not least <= count <= block**2:
                raise ValueError(
                    f"dct_{name}_channels={count} must be between {least} and {block**2}, "
                    f"the coefficients of a block of {block}x{block} pixels"
                )
        if not 0 <= whitening <= 1:
            raise ValueError(
                f"dct_whitening={whitening} must be between 0 (the spectrum of images) and 1 "
                "(all channels of equal variance)"
            )
        self.block = block
        self.downsample: tuple[int, int, int] = (1, block, block)
        kept = zigzag(block)
        chosen = [(0, u, v) for u, v in kept[:luma_channels]]
        chosen += [(row, u, v) for row in (1, 2) for u, v in kept[:chroma_channels]]
        self.latent_channels = len(chosen)
        self._analysis_CP = _analysis_matrix(block, chosen).to(device, dtype)
        std_C = torch.tensor([expected_std(block, *index) for index in chosen], dtype=torch.float64)
        left_C = std_C ** (1 - whitening)  # deviations that division by std ** whitening leaves
        scale_C = 1 / (std_C**whitening * left_C.square().mean().sqrt())
        self.latent_mean, self.latent_scale = [0.0] * self.latent_channels, scale_C.tolist()
        self._scale_C111 = scale_C.to(device, dtype).view(-1, 1, 1, 1)
        self.provenance: dict[str, object] = {
            "class": "DctEncoder",
            "what": "block DCT transform, not a learned VAE",
            "weights": "none needed",
            "block": block,
            "luma_channels": luma_channels,
            "chroma_channels": chroma_channels,
            "whitening": whitening,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The latents' (C, T, H, W).

        Raises:
            ValueError: height or width is not a multiple of the block.
        """
        for name, size in (("height", height), ("width", width)):
            if size % self.block or size < self.block:
                nearest = max(1, round(size / self.block)) * self.block
                raise ValueError(
                    f"{name}={size} must be a multiple of the DCT block of {self.block} pixels: "
                    f"use {nearest}"
                )
        return self.latent_channels, num_frames, height // self.block, width // self.block

    @torch.no_grad()
    def encode(self, pixels_BCTHW: Tensor) -> LatentStats:
        """DCT coefficients as the mean of a posterior without variance."""
        check_pixels(pixels_BCTHW)
        self.latent_shape(*pixels_BCTHW.shape[2:])
        blocks_BTHWP = rearrange(
            to_unit_range(pixels_BCTHW).to(self._analysis_CP),
            "b c t (h p) (w q) -> b t h w (c p q)",
            p=self.block,
            q=self.block,
        )
        mean_BTHWC = blocks_BTHWP @ self._analysis_CP.T
        return LatentStats(rearrange(mean_BTHWC, "b t h w c -> b c t h w").contiguous())

    def finish(self, stats: LatentStats, noise_BCTHW: Tensor | None = None) -> Tensor:
        """Coefficients times their scale; without a posterior noise is ignored."""
        return sample_posterior(stats, noise_BCTHW) * self._scale_C111

    @torch.no_grad()
    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Pixels, float32, clamped to [-1, 1]; coefficients that were not kept count as zero."""
        coefficients_BCTHW = latents_BCTHW.to(self._analysis_CP) / self._scale_C111
        blocks_BTHWP = rearrange(coefficients_BCTHW, "b c t h w -> b t h w c") @ self._analysis_CP
        pixels_BCTHW = rearrange(
            blocks_BTHWP,
            "b t h w (c p q) -> b c t (h p) (w q)",
            c=3,
            p=self.block,
            q=self.block,
        )
        return pixels_BCTHW.float().clamp(-1, 1)


def zigzag(block: int) -> list[tuple[int, int]]:
    """Indices (u, v) = (vertical, horizontal) of a block, low frequencies first, as in JPEG."""
    indices = [(u, v) for u in range(block) for v in range(block)]
    # Along an antidiagonal the walk alternates: up on even ones (u falling), down on odd ones.
    return sorted(indices, key=lambda uv: (sum(uv), uv[0] if sum(uv) % 2 else -uv[0]))


def expected_std(block: int, row: int, u: int, v: int) -> float:
    """Standard deviation of coefficient (u, v) of colour row 0..2, for pixels in [-1, 1]."""
    if u == v == 0:
        return _LEVEL[row] * block
    frequency = math.hypot(u, v) / (2 * block)
    return _AMPLITUDE[row] * frequency ** -_SLOPE[row]


def _analysis_matrix(block: int, chosen: list[tuple[int, int, int]]) -> Tensor:
    """Orthonormal rows (C, P), float64: one colour row times one two-dimensional cosine each."""
    n = torch.arange(block, dtype=torch.float64)
    # DCT-II: basis[u, n] = sqrt(2 / block) * cos(pi (2 n + 1) u / (2 block)); row 0 over sqrt(2).
    basis = torch.cos(math.pi / (2 * block) * (2 * n + 1) * n[:, None]) * math.sqrt(2 / block)
    basis[0] /= math.sqrt(2)
    colour = torch.tensor(_COLOUR, dtype=torch.float64)
    rows = [torch.einsum("c,p,q->cpq", colour[k], basis[u], basis[v]) for k, u, v in chosen]
    return torch.stack(rows).flatten(1)
