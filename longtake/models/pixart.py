"""PixArt: full attention over all tokens, cross-attention to text, one modulation for all blocks.

    latents → patches + positions
            → depth × [self-attention → cross-attention → MLP]
            → final layer → latents

The timestep alone makes six rows of shift, scale and gate, once for all blocks; each block adds a
table of its own (adaLN-single). Text enters through cross-attention, which is neither normalized
nor gated. With several frames it is the full-attention video model of Open-Sora 1.0: the same
blocks over T·S tokens, and positions in time.

Source: Chen et al., "PixArt-alpha", arXiv:2310.00426.

Letters: B batch, C channels, T frames, H W height, width, S patches per frame, N = T S tokens,
L text tokens, K their width, D hidden size, P values per patch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from longtake.models.config import ModelConfig
from longtake.models.embedders import CaptionEmbedder, PatchEmbed, TimestepEmbedder, unpatchify
from longtake.models.layers import (
    CrossAttention,
    FullAttention,
    GatedMlp,
    SelfAttention,
    TableFinalLayer,
    adaptive_linear,
    modulation_table,
)
from longtake.models.positions import video_positions


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention and MLP; the first and last are modulated and gated."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.scale_shift_table = modulation_table(6, hidden_size)
        self.attn = SelfAttention(hidden_size, num_heads, FullAttention())
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.mlp = GatedMlp(hidden_size, int(mlp_ratio * hidden_size))

    def forward(
        self,
        x_BND: Tensor,
        modulation_B6D: Tensor,
        text_BLD: Tensor,
        text_mask_BL: Tensor | None = None,
    ) -> Tensor:
        rows_B1D = (self.scale_shift_table + modulation_B6D).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows_B1D

        x_BND = self.attn(x_BND, shift_msa, scale_msa, gate_msa)
        x_BND = self.cross_attn(x_BND, text_BLD, text_mask_BL)
        return self.mlp(x_BND, shift_mlp, scale_mlp, gate_mlp)


class PixArt(nn.Module):
    """The text-conditional image and video transformer, with the public weights' names."""

    condition: Literal["text"] = "text"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        depth, hidden_size, num_heads = config.dimensions
        self.x_embedder = PatchEmbed(
            config.in_channels, hidden_size, config.patch_size, frame_by_frame=True
        )
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.t_block = adaptive_linear(hidden_size, 6)
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, hidden_size, config.max_caption_tokens
        )
        if config.micro_conditioning:
            self.csize_embedder = TimestepEmbedder(hidden_size // 3)
            self.ar_embedder = TimestepEmbedder(hidden_size // 3)
        self.blocks = nn.ModuleList(
            PixArtBlock(hidden_size, num_heads, config.mlp_ratio) for _ in range(depth)
        )
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
        image_size_B2: Tensor | None = None,
        aspect_ratio_B: Tensor | None = None,
    ) -> Tensor:
        """Prediction with the size and dtype of the latents, and `config.out_channels` channels.

        t_B is in the network's units, 0 to 1000. The mask is True on real text tokens; where drop_B
        is True the null caption takes a caption's place under the same mask. An image is one frame;
        only then are there no positions in time.

        With micro_conditioning, image_size_B2 is height and width in pixels and aspect_ratio_B
        their quotient.
        """
        x_BTSD = self.x_embedder(latents_BCTHW)
        grid_THW = self.x_embedder.grid(latents_BCTHW)
        positions_TSD = video_positions(*grid_THW, self.config, x_BTSD.device)
        x_BND = (x_BTSD + positions_TSD.to(x_BTSD.dtype)).flatten(1, 2)
        t_BD = self.t_embedder(t_B)
        if self.config.micro_conditioning:
            t_BD = t_BD + self.embed_sizes(image_size_B2, aspect_ratio_B)
        modulation_B6D = self.t_block(t_BD).unflatten(1, (6, -1))
        text_BLD = self.y_embedder(prompt_embeds_BLK, drop_B)

        for block in self.blocks:
            x_BND = block(x_BND, modulation_B6D, text_BLD, prompt_mask_BL)

        patches_BNP = self.final_layer(x_BND, t_BD)
        return unpatchify(patches_BNP, self.config.patch_size, latents_BCTHW)

    def embed_sizes(self, image_size_B2: Tensor | None, aspect_ratio_B: Tensor | None) -> Tensor:
        """Height, width and aspect ratio, a third of (B, D) each."""
        if image_size_B2 is None or aspect_ratio_B is None:
            raise ValueError(
                "this model has micro_conditioning: pass image_size_B2 (height and width in "
                "pixels) and aspect_ratio_B (height / width)"
            )
        height_width_BD = self.csize_embedder(image_size_B2.flatten()).view(len(image_size_B2), -1)
        ratio_BD = self.ar_embedder(aspect_ratio_B.flatten())
        return torch.cat((height_width_BD, ratio_BD), dim=1)
