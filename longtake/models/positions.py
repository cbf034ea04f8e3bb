"""Fixed sine-cosine positions in space and time, for any grid and never stored with the weights.

Letters: T frames, H W height and width in patches, S = H W, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtake.models.config import ModelConfig
from longtake.ops.sincos import sincos


def spatial_positions(
    height: int, width: int, config: ModelConfig, device: torch.device | None = None
) -> Tensor:
    """Positions of a frame's patches in row-major order, float32 (S, D).

    The first half of D encodes the column and the second the row, as in all public DiT weights.

    Source: He et al., "Masked autoencoders are scalable vision learners", arXiv:2111.06377, and for
    base_size Chen et al., "PixArt-alpha", arXiv:2310.00426.
    """
    quarter = config.dimensions.hidden_size // 4

    def axis_table(count: int) -> Tensor:
        stretch = 1.0 if config.base_size is None else count / config.base_size
        place = torch.arange(count, dtype=torch.float64, device=device) / stretch
        # Rounded to float32 because that is what the public weights were trained with.
        return sincos((place / config.space_scale).float(), quarter)

    columns_HWF = axis_table(width)[None, :].expand(height, -1, -1)
    rows_HWF = axis_table(height)[:, None].expand(-1, width, -1)
    return torch.cat((columns_HWF, rows_HWF), dim=-1).flatten(0, 1)


def temporal_positions(
    num_frames: int, config: ModelConfig, device: torch.device | None = None
) -> Tensor:
    """Positions of frames in time, float32 (T, D)."""
    place_T = torch.arange(num_frames, dtype=torch.float64, device=device) / config.time_scale
    return sincos(place_T, config.dimensions.hidden_size // 2)


def video_positions(
    num_frames: int,
    height: int,
    width: int,
    config: ModelConfig,
    device: torch.device | None = None,
) -> Tensor:
    """Sum of both, float32 (T, S, D); an image, one frame, has no positions in time: (1, S, D)."""
    positions_1SD = spatial_positions(height, width, config, device)[None]
    if num_frames == 1:
        return positions_1SD
    return positions_1SD + temporal_positions(num_frames, config, device)[:, None]


class TemporalPositions(nn.Module):
    """`temporal_positions` as a part of a model, for one that adds them between its blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, num_frames: int, device: torch.device | None = None) -> Tensor:
        return temporal_positions(num_frames, self.config, device)
