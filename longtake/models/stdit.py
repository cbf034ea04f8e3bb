"""STDiT as in Open-Sora 1.0: attention factorized into space and time, cross-attention to text.

    latents → patches + spatial positions
            → depth × [spatial attention → temporal attention → cross-attention → MLP]
            → final layer → latents

It is PixArt with one more branch, `attn_temp`, whose oddities the trained weights rely on: it reads
the raw residual stream, without norm or modulation; it shares the spatial branch's gate; and it
sees positions in time in block 0 only. `stdit2` is the block without them.

Source: Zheng et al., "Open-Sora", arXiv:2412.20404; code of v1.0.0.

Letters: B batch, C channels, T frames, H W height, width, S patches per frame, N = T S tokens,
L text tokens, K their width, D hidden size, P values per patch.
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
    SelfAttention,
    SpatialAttention,
    TableFinalLayer,
    TemporalAttention,
    adaptive_linear,
    modulation_table,
)
from longtake.models.positions import spatial_positions, temporal_positions
from longtake.ops.carried_linear import carried_linear


class TemporalBranch(SelfAttention):
    """Attention along time, without norm or modulation; the first block's adds the positions, to
    its own input only."""

    def __init__(self, config: ModelConfig, *, add_positions: bool) -> None:
        _, hidden_size, num_heads = config.dimensions
        super().__init__(hidden_size, num_heads, TemporalAttention())
        self.config = config
        self.add_positions = add_positions

    def forward(self, x_BTSD: Tensor, gate_B11D: Tensor) -> Tensor:
        weights = self.qkv.weight, self.qkv.bias.detach()
        if self.add_positions:
            time_TD = temporal_positions(x_BTSD.shape[1], self.config, x_BTSD.device)
            _, qkv = carried_linear(x_BTSD + time_TD[:, None].to(x_BTSD.dtype), *weights)
        else:
            x_BTSD, qkv = carried_linear(x_BTSD, *weights)
        return self.add(x_BTSD, gate_B11D, self.attend(qkv))


class STDiTBlock(nn.Module):
    """Spatial, temporal and cross-attention, and an MLP."""

    def __init__(self, config: ModelConfig, *, is_first: bool) -> None:
        super().__init__()
        _, hidden_size, num_heads = config.dimensions
        self.scale_shift_table = modulation_table(6, hidden_size)
        self.attn = SelfAttention(hidden_size, num_heads, SpatialAttention())
        self.attn_temp = TemporalBranch(config, add_positions=is_first)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.mlp = GatedMlp(hidden_size, int(config.mlp_ratio * hidden_size))

    def forward(
        self,
        x_BTSD: Tensor,
        modulation_B6D: Tensor,
        text_BLD: Tensor,
        text_mask_BL: Tensor | None = None,
    ) -> Tensor:
        rows_B11D = (self.scale_shift_table + modulation_B6D)[:, :, None, None].unbind(1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows_B11D

        x_BTSD = self.attn(x_BTSD, shift_msa, scale_msa, gate_msa)
        x_BTSD = self.attn_temp(x_BTSD, gate_msa)
        x_BTSD = self.cross_attn(x_BTSD, text_BLD, text_mask_BL)
        return self.mlp(x_BTSD, shift_mlp, scale_mlp, gate_mlp)


class STDiT(nn.Module):
    """The text-conditional video transformer; parameter names are those of the public weights."""

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
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, hidden_size, config.max_caption_tokens
        )
        self.blocks = nn.ModuleList(STDiTBlock(config, is_first=i == 0) for i in range(depth))
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
        text_BLD = self.y_embedder(prompt_embeds_BLK, drop_B)

        for block in self.blocks:
            x_BTSD = block(x_BTSD, modulation_B6D, text_BLD, prompt_mask_BL)

        patches_BNP = self.final_layer(x_BTSD.flatten(1, 2), t_BD)
        return unpatchify(patches_BNP, self.config.patch_size, latents_BCTHW)
