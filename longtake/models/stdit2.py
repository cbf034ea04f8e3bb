"""STDiT2: the STDiT block put right, for new training; `stdit` is for Open-Sora 1.0's weights.

    latents → patches + spatial positions
            → depth × [spatial attention → temporal attention → cross-attention → MLP]
            → final layer → latents

Against `stdit`, the temporal branch has its own norm and its own shift, scale and gate; it sees
time through rotary positions in every block, so clips of any length work alike; and queries and
keys of both self-attentions are RMS-normalized, which keeps attention logits bounded in low
precision.

Source: Open-Sora v1.1.0's STDiT2, without its embeddings of size and frame count.

Letters: B batch, C channels, T frames, H W height, width, S patches per frame, N = T S tokens,
L text tokens, K their width, D hidden size, A heads, E size per head, P values per patch.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from longtake.models.config import ModelConfig
from longtake.models.embedders import CaptionEmbedder, PatchEmbed, TimestepEmbedder, unpatchify
from longtake.models.layers import (
    CrossAttention,
    GatedMlp,
    NormalizedSelfAttention,
    SpatialAttention,
    TableFinalLayer,
    TemporalAttention,
    adaptive_linear,
    modulation_table,
)
from longtake.models.positions import spatial_positions


class STDiT2Block(nn.Module):
    """Spatial, temporal and cross-attention, and an MLP; all but the third are modulated and
    gated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _, hidden_size, num_heads = config.dimensions
        self.scale_shift_table = modulation_table(6, hidden_size)
        self.scale_shift_table_temporal = modulation_table(3, hidden_size)
        self.attn = NormalizedSelfAttention(hidden_size, num_heads, SpatialAttention())
        self.attn_temp = NormalizedSelfAttention(
            hidden_size, num_heads, TemporalAttention(), time_scale=config.time_scale
        )
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.mlp = GatedMlp(hidden_size, int(config.mlp_ratio * hidden_size))

    def forward(
        self,
        x_BTSD: Tensor,
        modulation_B6D: Tensor,
        modulation_temporal_B3D: Tensor,
        text_BLD: Tensor,
        text_mask_BL: Tensor | None = None,
    ) -> Tensor:
        rows_B11D = (self.scale_shift_table + modulation_B6D)[:, :, None, None].unbind(1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows_B11D
        rows_B3D = self.scale_shift_table_temporal + modulation_temporal_B3D
        shift_temporal, scale_temporal, gate_temporal = rows_B3D[:, :, None, None].unbind(1)

        x_BTSD = self.attn(x_BTSD, shift_msa, scale_msa, gate_msa)
        x_BTSD = self.attn_temp(x_BTSD, shift_temporal, scale_temporal, gate_temporal)
        x_BTSD = self.cross_attn(x_BTSD, text_BLD, text_mask_BL)
        return self.mlp(x_BTSD, shift_mlp, scale_mlp, gate_mlp)


class STDiT2(nn.Module):
    """The text-conditional video transformer for new training."""

    condition: Literal["text"] = "text"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        depth, hidden_size, _ = config.dimensions
        self.x_embedder = PatchEmbed(
            config.in_channels, hidden_size, config.patch_size, frame_by_frame=False
        )
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.t_block = adaptive_linear(hidden_size, 6)
        self.t_block_temp = adaptive_linear(hidden_size, 3)
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, hidden_size, config.max_caption_tokens
        )
        self.blocks = nn.ModuleList(STDiT2Block(config) for _ in range(depth))
        patch_values = math.prod(config.patch_size) * config.out_channels
        self.final_layer = TableFinalLayer(hidden_size, patch_values)

    def forward(
        self,
        latents_BCTHW: Tensor,
        t_B: Tensor,
        *,
        prompt_embeds_BLK: Tensor,
        prompt_mask_BL: Tensor | None = None,
        drop_B: Tensor | None = None,
    ) -> Tensor:
        """Prediction with the size and dtype of the latents, and `config.out_channels` channels.

        t_B is in the network's units, 0 to 1000. The mask is True on real text tokens; where drop_B
        is True the null caption takes a caption's place under the same mask. An image is one frame.
        """
        x_BTSD = self.x_embedder(latents_BCTHW)
        _, H, W = self.x_embedder.grid(latents_BCTHW)
        x_BTSD = x_BTSD + spatial_positions(H, W, self.config, x_BTSD.device).to(x_BTSD.dtype)
        t_BD = self.t_embedder(t_B)
        modulation_B6D = self.t_block(t_BD).unflatten(1, (6, -1))
        modulation_temporal_B3D = self.t_block_temp(t_BD).unflatten(1, (3, -1))
        text_BLD = self.y_embedder(prompt_embeds_BLK, drop_B)

        for block in self.blocks:
            x_BTSD = block(
                x_BTSD, modulation_B6D, modulation_temporal_B3D, text_BLD, prompt_mask_BL
            )

        patches_BNP = self.final_layer(x_BTSD.flatten(1, 2), t_BD)
        return unpatchify(patches_BNP, self.config.patch_size, latents_BCTHW)
