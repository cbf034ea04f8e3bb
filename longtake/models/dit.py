"""DiT: full attention over all tokens, conditioned on a class label through adaLN-Zero.

    latents → patches + positions
            → depth × [self-attention → MLP]
            → final layer → latents

Each block turns timestep + label into shift, scale and gate of both its branches. With several
frames it is the video DiT of Open-Sora 1.0: the same blocks over T·S tokens, and positions in time.

Source: Peebles and Xie, "Scalable diffusion models with transformers", arXiv:2212.09748.

Letters: B batch, C channels, T frames, H W height, width, S patches per frame, N = T S tokens,
D hidden size, P values per patch.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from longtake.models.config import ModelConfig
from longtake.models.embedders import LabelEmbedder, PatchEmbed, TimestepEmbedder, unpatchify
from longtake.models.layers import (
    AdaptiveFinalLayer,
    FullAttention,
    GatedMlp,
    SelfAttention,
    adaptive_linear,
)
from longtake.models.positions import video_positions


class DiTBlock(nn.Module):
    """Self-attention with the given core, then an MLP; the condition modulates and gates both."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, core: nn.Module) -> None:
        super().__init__()
        self.attn = SelfAttention(hidden_size, num_heads, core)
        self.mlp = GatedMlp(hidden_size, int(mlp_ratio * hidden_size))
        self.adaLN_modulation = adaptive_linear(hidden_size, 6)

    def forward(self, x_BND: Tensor, condition_B1D: Tensor) -> Tensor:
        """The next x_BND; or x_BTSD from x_BTSD and condition_B11D."""
        rows_B1D = self.adaLN_modulation(condition_B1D).chunk(6, dim=-1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows_B1D

        x_BND = self.attn(x_BND, shift_msa, scale_msa, gate_msa)
        return self.mlp(x_BND, shift_mlp, scale_mlp, gate_mlp)


class DiT(nn.Module):
    """The class-conditional diffusion transformer, with the public weights' parameter names."""

    condition: Literal["label"] = "label"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        depth, hidden_size, num_heads = config.dimensions
        self.x_embedder = PatchEmbed(
            config.in_channels, hidden_size, config.patch_size, frame_by_frame=True
        )
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, hidden_size)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, config.mlp_ratio, FullAttention())
            for _ in range(depth)
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
        is True. An image is one frame; only then are there no positions in time.
        """
        x_BTSD = self.x_embedder(latents_BCTHW)
        grid_THW = self.x_embedder.grid(latents_BCTHW)
        positions_TSD = video_positions(*grid_THW, self.config, x_BTSD.device)
        x_BND = (x_BTSD + positions_TSD.to(x_BTSD.dtype)).flatten(1, 2)
        condition_B1D = (self.t_embedder(t_B) + self.y_embedder(labels_B, drop_B))[:, None]

        for block in self.blocks:
            x_BND = block(x_BND, condition_B1D)

        patches_BNP = self.final_layer(x_BND, condition_B1D)
        return unpatchify(patches_BNP, self.config.patch_size, latents_BCTHW)
