"""The parts that blocks are made of.

Self-attention is in two: a module with the weights, and a child `core` without any, which computes
attention from q, k and v and alone knows which tokens see each other.

Letters: B batch, N tokens, T frames, S spatial patches, L text tokens, D hidden size, A heads,
E size per head, P values per patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.ops.attention import attention
from longtake.ops.norm_modulate import norm_modulate
from longtake.ops.rms_norm import rms_norm
from longtake.ops.temporal_attention import temporal_attention


class FullAttention(nn.Module):
    """Every query sees every key, or every valid key of its batch element."""

    def forward(
        self, q_BNAE: Tensor, k_BLAE: Tensor, v_BLAE: Tensor, key_mask_BL: Tensor | None = None
    ) -> Tensor:
        return attention(q_BNAE, k_BLAE, v_BLAE, key_mask_BL)


class SpatialAttention(nn.Module):
    """The patches of one frame see each other."""

    def forward(self, q_BTSAE: Tensor, k_BTSAE: Tensor, v_BTSAE: Tensor) -> Tensor:
        out = attention(q_BTSAE.flatten(0, 1), k_BTSAE.flatten(0, 1), v_BTSAE.flatten(0, 1))
        return out.unflatten(0, q_BTSAE.shape[:2])


class TemporalAttention(nn.Module):
    """The frames see each other at one place."""

    def forward(self, q_BTSAE: Tensor, k_BTSAE: Tensor, v_BTSAE: Tensor) -> Tensor:
        return temporal_attention(q_BTSAE, k_BTSAE, v_BTSAE)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the size of a head."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_size))

    def forward(self, x_BNAE: Tensor) -> Tensor:
        return rms_norm(x_BNAE, self.weight)


class SelfAttention(nn.Module):
    """Attention of tokens among themselves, in whatever layout the core reads: x_BND or x_BTSD."""

    def __init__(
        self, hidden_size: int, num_heads: int, core: nn.Module, *, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.core = core
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BND: Tensor, /) -> Tensor:
        # q, k and v are strided views into one product.
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        out_BNAE = self.core(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out_BNAE.flatten(-2))


class CrossAttention(nn.Module):
    """Attention of tokens (x_BND or x_BTSD) to the valid text tokens of their sample."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.core = FullAttention()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, x_BND: Tensor, text_BLD: Tensor, text_mask_BL: Tensor | None = None
    ) -> Tensor:
        q_BNAE = self.q_linear(x_BND).flatten(1, -2).unflatten(-1, (self.num_heads, -1))
        k_BLAE, v_BLAE = self.kv_linear(text_BLD).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        out_BNAE = self.core(q_BNAE, k_BLAE, v_BLAE, text_mask_BL)
        return self.proj(out_BNAE.flatten(-2).view_as(x_BND))


class Mlp(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, in_size: int, inner_size: int, out_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_size, inner_size)
        self.fc2 = nn.Linear(inner_size, out_size)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND), approximate="tanh"))


def adaptive_linear(hidden_size: int, num_rows: int) -> nn.Sequential:
    """SiLU and a linear layer: from a condition (B, D) to num_rows rows of shift, scale or gate."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, num_rows * hidden_size))


def modulation_table(num_rows: int, hidden_size: int) -> nn.Parameter:
    """A block's own rows of shift, scale or gate, added to those that all blocks share."""
    return nn.Parameter(torch.empty(num_rows, hidden_size))


class AdaptiveFinalLayer(nn.Module):
    """Tokens to patches, modulated by a linear layer on the condition: DiT, Latte."""

    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.adaLN_modulation = adaptive_linear(hidden_size, 2)
        self.linear = nn.Linear(hidden_size, out_size)

    def forward(self, x_BND: Tensor, condition_B1D: Tensor) -> Tensor:
        """Values per patch (B, N, P); (B, T, S, P) for x_BTSD and condition_B11D."""
        shift_B1D, scale_B1D = self.adaLN_modulation(condition_B1D).chunk(2, dim=-1)
        return self.linear(norm_modulate(x_BND, shift_B1D, scale_B1D))


class TableFinalLayer(nn.Module):
    """Tokens to patches, modulated by a table added to the timestep embedding: PixArt, STDiT."""

    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.scale_shift_table = modulation_table(2, hidden_size)
        self.linear = nn.Linear(hidden_size, out_size)

    def forward(self, x_BND: Tensor, t_BD: Tensor) -> Tensor:
        """Values per patch (B, N, P)."""
        shift_B1D, scale_B1D = (self.scale_shift_table + t_BD[:, None]).chunk(2, dim=1)
        return self.linear(norm_modulate(x_BND, shift_B1D, scale_B1D))
