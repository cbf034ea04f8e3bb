"""The parts that blocks are made of: branches that read the residual stream and add to it.

A branch takes the stream x and returns the next one. It is written with the operations of
`longtake.ops` that hold a linear layer and what stands beside it, since norm, modulation, gate and
residual cost a GPU nearly as much as the products if each of them is a pass over all tokens.

Self-attention is in two: a module with the weights, and a child `core` without any, which computes
attention from the product of q, k and v and alone knows which tokens see each other.

Letters: B batch, N tokens, T frames, S spatial patches, L text tokens, D hidden size, A heads,
E size per head, P values per patch; 3 is q, k and v.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtake.ops.attention import self_attention
from longtake.ops.bias_gradient import with_bias_gradient
from longtake.ops.carried_linear import carried_linear
from longtake.ops.gated_linear import gated_linear
from longtake.ops.gated_mlp import gated_mlp
from longtake.ops.gelu import gelu
from longtake.ops.modulated_linear import modulated_linear
from longtake.ops.qk_norm_rotary import qk_norm_rotary
from longtake.ops.sincos import sincos
from longtake.ops.temporal_attention import temporal_attention
from longtake.ops.text_attention import text_attention


class FullAttention(nn.Module):
    """All tokens see each other."""

    def forward(self, qkv_BN3AE: Tensor) -> Tensor:
        return self_attention(qkv_BN3AE)


class SpatialAttention(nn.Module):
    """The patches of one frame see each other."""

    def forward(self, qkv_BTS3AE: Tensor) -> Tensor:
        return self_attention(qkv_BTS3AE.flatten(0, 1)).unflatten(0, qkv_BTS3AE.shape[:2])


class TemporalAttention(nn.Module):
    """The frames see each other at one place."""

    def forward(self, qkv_BTS3AE: Tensor) -> Tensor:
        return temporal_attention(qkv_BTS3AE)


class TextAttention(nn.Module):
    """Tokens see the valid text tokens of their sample."""

    def forward(self, q_BNAE: Tensor, kv_BL2AE: Tensor, text_mask_BL: Tensor | None) -> Tensor:
        return text_attention(q_BNAE, kv_BL2AE, text_mask_BL)


class SelfAttention(nn.Module):
    """Modulated and gated attention of tokens among themselves, in whatever layout the core reads:
    x_BND or x_BTSD."""

    recompute = True
    """Whether the backward computes normalized tokens again instead of keeping them."""

    def __init__(self, hidden_size: int, num_heads: int, core: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.core = core
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, gate_B1D: Tensor
    ) -> Tensor:
        weights = self.qkv.weight, self.qkv.bias.detach()
        x_BND, qkv = modulated_linear(
            x_BND, shift_B1D, scale_B1D, *weights, recompute=self.recompute
        )
        return self.add(x_BND, gate_B1D, self.attend(qkv))

    def attend(self, qkv: Tensor) -> Tensor:
        """Attention of the product (..., 3 D), (..., D). `qkv.bias` gets the gradient of q here."""
        q_bias_1AE = self._split(self.qkv.bias)[:1]
        return self.core(with_bias_gradient(self._split(qkv), q_bias_1AE)).flatten(-2)

    def add(self, x_BND: Tensor, gate_B1D: Tensor, attended_BND: Tensor) -> Tensor:
        """The stream with what was attended to, projected and gated. `qkv.bias` gets the gradient
        of v here."""
        v_bias_D = self._split(self.qkv.bias)[2].flatten()
        layer = self.proj.weight, self.proj.bias, v_bias_D
        return gated_linear(x_BND, gate_B1D, attended_BND, *layer)

    def _split(self, qkv: Tensor) -> Tensor:
        """(..., 3 D) as (..., 3, A, E)."""
        return qkv.unflatten(-1, (3, self.num_heads, -1))


class RMSNorm(nn.Module):
    """The weights of a root-mean-square norm over the size of a head."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_size))


class NormalizedSelfAttention(SelfAttention):
    """Self-attention of RMS-normalized queries and keys; with a time scale, they are then turned by
    their frame's place in time."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        core: nn.Module,
        *,
        time_scale: float | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, core)
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)
        self.time_scale = time_scale

    def attend(self, qkv: Tensor) -> Tensor:
        # A norm comes between: k's bias does move the scores.
        qk_bias_2AE = self._split(self.qkv.bias)[:2]
        qkv_BTS3AE = with_bias_gradient(self._split(qkv), qk_bias_2AE)
        sin_TF = cos_TF = None
        if self.time_scale is not None:
            num_frames, head_size = qkv_BTS3AE.shape[1], qkv_BTS3AE.shape[-1]
            place_T = torch.arange(num_frames, dtype=torch.float64, device=qkv.device)
            sin_TF, cos_TF = sincos(place_T / self.time_scale, head_size // 2).chunk(2, dim=1)
        weights = self.q_norm.weight, self.k_norm.weight
        return self.core(qk_norm_rotary(qkv_BTS3AE, *weights, sin_TF, cos_TF)).flatten(-2)


class CrossAttention(nn.Module):
    """Attention of tokens (x_BND or x_BTSD) to the valid text tokens of their sample, ungated and
    without a norm."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.core = TextAttention()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, x_BND: Tensor, text_BLD: Tensor, text_mask_BL: Tensor | None = None
    ) -> Tensor:
        x_BND, q_BND = carried_linear(x_BND, self.q_linear.weight, self.q_linear.bias)
        q_BNAE = q_BND.flatten(1, -2).unflatten(-1, (self.num_heads, -1))
        kv_BL2AE = self.kv_linear(text_BLD).unflatten(-1, (2, self.num_heads, -1))
        out_BND = self.core(q_BNAE, kv_BL2AE, text_mask_BL).flatten(-2).view_as(x_BND)
        return gated_linear(x_BND, None, out_BND, self.proj.weight, self.proj.bias)


class Mlp(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, in_size: int, inner_size: int, out_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_size, inner_size)
        self.fc2 = nn.Linear(inner_size, out_size)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x_BND)))


class GatedMlp(Mlp):
    """The MLP as a branch: modulated before, gated after."""

    recompute = True
    """Whether the backward computes normalized tokens and activations again."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__(hidden_size, inner_size, hidden_size)

    def forward(
        self, x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, gate_B1D: Tensor
    ) -> Tensor:
        weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        rows = shift_B1D, scale_B1D, gate_B1D
        return gated_mlp(x_BND, *rows, *weights, recompute=self.recompute)


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
        weights = self.linear.weight, self.linear.bias
        return modulated_linear(x_BND, shift_B1D, scale_B1D, *weights)[1]


class TableFinalLayer(nn.Module):
    """Tokens to patches, modulated by a table added to the timestep embedding: PixArt, STDiT."""

    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.scale_shift_table = modulation_table(2, hidden_size)
        self.linear = nn.Linear(hidden_size, out_size)

    def forward(self, x_BND: Tensor, t_BD: Tensor) -> Tensor:
        """Values per patch (B, N, P)."""
        shift_B1D, scale_B1D = (self.scale_shift_table + t_BD[:, None]).chunk(2, dim=1)
        weights = self.linear.weight, self.linear.bias
        return modulated_linear(x_BND, shift_B1D, scale_B1D, *weights)[1]
