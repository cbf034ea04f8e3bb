"""What a model is made of: its kind, its size and its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

ModelName = Literal["dit", "pixart", "stdit", "stdit2", "latte"]
SizeName = Literal["tiny", "S", "B", "L", "XL"]


class ModelSize(NamedTuple):
    """The three numbers that scale a transformer."""

    depth: int
    hidden_size: int
    num_heads: int


# fmt: off
SIZES: dict[SizeName, ModelSize] = {
    #                depth  hidden  heads
    "tiny": ModelSize(   4,    128,     4),
    "S":    ModelSize(  12,    384,     6),
    "B":    ModelSize(  12,    768,    12),
    "L":    ModelSize(  24,   1024,    16),
    "XL":   ModelSize(  28,   1152,    16),
}
# fmt: on


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A diffusion transformer; the defaults are Open-Sora 1.0's STDiT-XL/2."""

    name: ModelName = "stdit"
    size: SizeName = "XL"
    depth: int | None = None
    """Blocks; overrides the size's. So do the next two."""
    hidden_size: int | None = None
    num_heads: int | None = None

    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns per token."""
    mlp_ratio: float = 4.0
    in_channels: int = 4
    """Channels of the latents."""
    learn_sigma: bool = True
    """Predict a variance beside the mean: twice as many output channels as input channels."""

    num_classes: int = 1000
    """Labels of dit and latte; one more row of their table is the null label."""
    caption_channels: int = 4096
    """Width of the prompt embeddings of pixart, stdit and stdit2."""
    max_caption_tokens: int = 120
    """Length of the null caption, and so of the longest caption that can be dropped."""

    space_scale: float = 1.0
    """Divides positions in space; Open-Sora 1.0 uses 0.5 at 256 pixels, 1 at 512, 2 at 1024."""
    time_scale: float = 1.0
    """Divides positions in time; Open-Sora 1.0 uses 2/3 for 64 frames."""
    base_size: int | None = None
    """Stretch every grid to this many positions per side, as PixArt does (training pixels / 16)."""
    micro_conditioning: bool = False
    """Embed image size and aspect ratio, as PixArt-XL-2-1024-MS does (pixart only)."""

    @property
    def dimensions(self) -> ModelSize:
        """Depth, hidden size and heads after the overrides."""
        size = SIZES[self.size]
        return ModelSize(
            depth=size.depth if self.depth is None else self.depth,
            hidden_size=size.hidden_size if self.hidden_size is None else self.hidden_size,
            num_heads=size.num_heads if self.num_heads is None else self.num_heads,
        )

    @property
    def out_channels(self) -> int:
        """Channels that the model predicts."""
        return 2 * self.in_channels if self.learn_sigma else self.in_channels
