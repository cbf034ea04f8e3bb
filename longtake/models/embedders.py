"""From the model's inputs to vectors of the hidden size, and from tokens back to latents.

Every embedder casts what it gets to the dtype of its own weights: a model runs in the precision of
its weights, whatever the dtype of latents and prompt embeddings.

Letters: B batch, C channels, T H W latent frames, height, width (or counts of patches where said),
N = T H W patches, P values per patch, L text tokens, K their width, D hidden size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from longtake.models.layers import Mlp


class PatchEmbed(nn.Module):
    """Latents cut into patches, each mapped to a token.

    A convolution whose stride is its kernel is a linear map of patches. The weight keeps the shape
    of the public checkpoints: that of a Conv2d for models that embed frame by frame, else of a
    Conv3d.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        patch_size: tuple[int, int, int],
        *,
        frame_by_frame: bool,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.patch_size = patch_size
        if frame_by_frame:
            if patch_size[0] != 1:
                raise ValueError(
                    f"patch_size={patch_size} joins {patch_size[0]} frames, but this model embeds "
                    f"frame by frame: use (1, {patch_size[1]}, {patch_size[2]}), or a stdit"
                )
            self.proj = nn.Conv2d(in_channels, hidden_size, patch_size[1:], stride=patch_size[1:])
        else:
            self.proj = nn.Conv3d(in_channels, hidden_size, patch_size, stride=patch_size)

    def grid(self, latents_BCTHW: Tensor) -> tuple[int, int, int]:
        """How many patches there are in time, height and width; a part of a patch counts as one."""
        frames, height, width = (
            -(-size // patch)
            for size, patch in zip(latents_BCTHW.shape[2:], self.patch_size, strict=True)
        )
        return frames, height, width

    def forward(self, latents_BCTHW: Tensor) -> Tensor:
        """Tokens x_BTSD; latents are padded with zeros at their ends to whole patches.

        Raises:
            ValueError: latents of another rank, or of other channels than the model's.
        """
        if latents_BCTHW.dim() != 5 or latents_BCTHW.shape[1] != self.in_channels:
            raise ValueError(
                f"latents have shape {tuple(latents_BCTHW.shape)}, but must be (batch, "
                f"{self.in_channels} channels, frames, height, width); an image is one frame"
            )
        pt, ph, pw = self.patch_size
        _, _, T, H, W = latents_BCTHW.shape
        if T % pt or H % ph or W % pw:
            latents_BCTHW = F.pad(latents_BCTHW, (0, -W % pw, 0, -H % ph, 0, -T % pt))
        patches_BTSP = rearrange(
            latents_BCTHW, "b c (t p) (h q) (w r) -> b t (h w) (c p q r)", p=pt, q=ph, r=pw
        )
        weight_DP = self.proj.weight.flatten(1)
        return F.linear(patches_BTSP.to(weight_DP.dtype), weight_DP, self.proj.bias)


def unpatchify(patches_BNP: Tensor, patch_size: tuple[int, int, int], like_BCTHW: Tensor) -> Tensor:
    """Values per patch put back in their places: latents with the T, H, W and dtype of others.

    The values of a patch are ordered (frame, row, column, channel). Padding is cut off.
    """
    T, H, W = like_BCTHW.shape[2:]
    pt, ph, pw = patch_size
    sizes = {"t": -(-T // pt), "h": -(-H // ph), "p": pt, "q": ph, "r": pw}
    out_BCTHW = rearrange(patches_BNP, "b (t h w) (p q r c) -> b c (t p) (h q) (w r)", **sizes)
    if out_BCTHW.shape[2:] != like_BCTHW.shape[2:]:
        # A copy: FSDP hooks a model's output and wants no view.
        out_BCTHW = out_BCTHW[:, :, :T, :H, :W].clone()
    return out_BCTHW.to(like_BCTHW.dtype)


class TimestepEmbedder(nn.Module):
    """A scalar per sample (a timestep, a size) through cosines and sines and two linear layers."""

    num_frequencies = 128

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.num_frequencies, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t_B: Tensor) -> Tensor:
        """Embedding (B, D) of scalars of any real dtype.

        The angles are float32 up to the cast to the weights: bfloat16 could not tell 998 from 1000.
        """
        index_F = torch.arange(self.num_frequencies, dtype=torch.float32, device=t_B.device)
        frequency_F = torch.exp(-math.log(10_000) * index_F / self.num_frequencies)
        angle_BF = t_B.float()[:, None] * frequency_F
        waves_BF = torch.cat((angle_BF.cos(), angle_BF.sin()), dim=1)
        return self.mlp(waves_BF.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A table of class labels whose last row stands for no label."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels_B: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """Embedding (B, D); where drop_B is True, that of the null label."""
        if drop_B is not None:
            labels_B = torch.where(drop_B, self.num_classes, labels_B)
        return self.embedding_table(labels_B)


class CaptionEmbedder(nn.Module):
    """Prompt embeddings projected to the hidden size, or the null caption in their place.

    The null caption is random, never trained, and travels with the weights.
    """

    y_embedding: Tensor  # (max_caption_tokens, K)

    def __init__(self, caption_channels: int, hidden_size: int, max_caption_tokens: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)
        self.register_buffer("y_embedding", torch.empty(max_caption_tokens, caption_channels))

    def forward(self, prompt_embeds_BLK: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """Text tokens (B, L, D); where drop_B is True, those of the null caption's first L tokens.

        Raises:
            ValueError: captions longer than the null caption cannot be dropped.
        """
        prompt_embeds_BLK = prompt_embeds_BLK.to(self.y_proj.fc1.weight.dtype)
        if drop_B is not None:
            length, longest = prompt_embeds_BLK.shape[1], self.y_embedding.shape[0]
            if length > longest:
                raise ValueError(
                    f"prompt_embeds_BLK has {length} tokens, but the null caption that replaces "
                    f"dropped ones has max_caption_tokens={longest}: shorten captions or raise it"
                )
            null_LK = self.y_embedding[:length].to(prompt_embeds_BLK.dtype)
            prompt_embeds_BLK = torch.where(drop_B[:, None, None], null_LK, prompt_embeds_BLK)
        return self.y_proj(prompt_embeds_BLK)
