"""How many latents and tokens a clip becomes.

Letters as in the models: T patches in time, S patches per frame, N = T · S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of one clip: `time` (T) rows of `space` (S) each."""

    time: int
    space: int

    @property
    def total(self) -> int:
        """N, what attention over all tokens sees."""
        return self.time * self.space


def has_full_attention(model: str) -> bool:
    """Whether all tokens of a sample see each other at once, frames of no account; in other models
    those of a frame do, and those of a place."""
    return model in ("dit", "pixart")


def latent_size(
    num_frames: int,
    height: int,
    width: int,
    *,
    downsample: tuple[int, int, int] = (1, 8, 8),
    causal: bool = False,
) -> tuple[int, int, int]:
    """Latent frames, height and width of a clip in frames and pixels; partial blocks count whole.

    A causal encoder keeps the first frame by itself and groups those after it: 17 frames become 5
    latent frames when it groups by 4.

    Raises ValueError if the clip or the encoder has no size.
    """
    sizes = {"num_frames": num_frames, "height": height, "width": width}
    _check_positive(sizes)
    _check_positive({f"downsample[{index}]": factor for index, factor in enumerate(downsample)})
    if causal:
        frames = 1 + _ceil_div(num_frames - 1, downsample[0])
    else:
        frames = _ceil_div(num_frames, downsample[0])
    return frames, _ceil_div(height, downsample[1]), _ceil_div(width, downsample[2])


def token_grid(
    latents: tuple[int, int, int], *, patch: tuple[int, int, int] = (1, 2, 2)
) -> TokenGrid:
    """The tokens of latents of (frames, height, width); a partial patch is padded to a whole."""
    _check_positive({f"latents[{index}]": size for index, size in enumerate(latents)})
    _check_positive({f"patch[{index}]": size for index, size in enumerate(patch)})
    time, rows, columns = (
        _ceil_div(size, length) for size, length in zip(latents, patch, strict=True)
    )
    return TokenGrid(time, rows * columns)


def count_tokens(
    num_frames: int,
    height: int,
    width: int,
    *,
    downsample: tuple[int, int, int] = (1, 8, 8),
    patch: tuple[int, int, int] = (1, 2, 2),
    causal: bool = False,
) -> int:
    """Tokens of a clip of so many frames and pixels: 16 frames of 256 x 256 are 4,096."""
    latents = latent_size(num_frames, height, width, downsample=downsample, causal=causal)
    return token_grid(latents, patch=patch).total


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _check_positive(values: dict[str, int]) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
