"""Latte: DiT's blocks, taking turns between space and time, conditioned on a class label.

    latents → patches + positions
            → depth / 2 × [spatial block → temporal block]
            → final layer → latents

Blocks 0, 2, ... attend among the patches of a frame, blocks 1, 3, ... among the frames at one
place. Positions in time are added once, before block 1.

Source: Ma et al., "Latte: latent diffusion transformer for video generation", arXiv:2401.03048.

Letters: B batch, C channels, T frames, H W height, width, S patches per frame, D hidden size,
P values per patch.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from longtake.models.config import ModelConfig
from longtake.models.dit import DiTBlock
from longtake.models.embedders import LabelEmbedder, PatchEmbed, TimestepEmbedder, unpatchify
from longtake.models.layers import AdaptiveFinalLayer, SpatialAttention, TemporalAttention
from longtake.models.positions import TemporalPositions, spatial_positions


class Latte(nn.Module):
    """The factorized class-conditional transformer, with the public weights' parameter names."""

    condition: Literal["label"] = "label"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        depth, hidden_size, num_heads = config.dimensions
        self.x_embedder = PatchEmbed(
            config.in_channels, hidden_size, config.patch_size, frame_by_frame=True
        )
        self.time_positions = TemporalPositions(config)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, hidden_size)
        self.blocks = nn.ModuleList(
            DiTBlock(
                hidden_size,
                num_heads,
                config.mlp_ratio,
                SpatialAttention() if i % 2 == 0 else TemporalAttention(),
            )
            for i in range(depth)
        )
        patch_values = math.prod(config.patch_size) * config.out_channels
        self.final_layer = AdaptiveFinalLayer(hidden_size, patch_values)

    def forward(
        self,
        latents_BCTHW: Tensor,
        t_B: Tensor,
        *,
        labels_B: Tensor,
        drop_B: Tensor | None = None,
    ) -> Tensor:
        """Prediction with the size and dtype of the latents, and `config.out_channels` channels.

        t_B is in the network's units, 0 to 1000. Labels are replaced by the null label where drop_B
        is True.
        """
        x_BTSD = self.x_embedder(latents_BCTHW)
        T, H, W = self.x_embedder.grid(latents_BCTHW)
        space_SD = spatial_positions(H, W, self.config, x_BTSD.device).to(x_BTSD.dtype)
        time_TD = self.time_positions(T, x_BTSD.device).to(x_BTSD.dtype)
        condition_BD = self.t_embedder(t_B) + self.y_embedder(labels_B, drop_B)
        condition_B11D = condition_BD[:, None, None]

        x_BTSD = x_BTSD + space_SD
        for i, block in enumerate(self.blocks):
            if i == 1:
                x_BTSD = x_BTSD + time_TD[:, None]
            x_BTSD = block(x_BTSD, condition_B11D)

        patches_BTSP = self.final_layer(x_BTSD, condition_B11D)
        return unpatchify(patches_BTSP.flatten(1, 2), self.config.patch_size, latents_BCTHW)
