"""The time below which a training step needs an explanation: its parts at a device's own ceilings.

No overlap and no trick is assumed: products of weights at the rate of such products, attention at
the rate of a good library's attention, element-wise traffic and the optimizer at copy speed. A
kernel that saves a pass over memory, or skips work, may well go below.

Letters as in the models: D hidden size, T patches in time, S patches per frame, N = T · S tokens,
L text tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from longtake.planning.tokens import TokenGrid

_BYTES = 2  # bf16
# Up to here a row of temporal attention is bound by memory, not by arithmetic.
_SHORT_SEQUENCE = 64
# Tensors of a token's D values that temporal attention reads and writes: 4 forward, 8 backward.
_TEMPORAL_TENSORS = 12
# Passes over a token's D values per block that are neither product nor attention (norms,
# modulation, GELU, gates, residuals; forward and backward), counted in compiled blocks.
_PASSES = {"dit": 70, "latte": 70, "pixart": 100, "stdit": 100, "stdit2": 100}
# Weights, gradient, two moments and the average are read, all but the gradient written; fp32.
_OPTIMIZER_BYTES = (5 + 4) * 4
# Attention multiplies 2 times forward and 5 times backward (scores once more).
_ATTENTION_PASSES = 3.5


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a device can do at best, measured on it."""

    matmul_flops: float
    """FLOP/s of a large square bf16 product."""
    linear_flops: float
    """FLOP/s of the transformer's own products, the geometric mean over their shapes."""
    copy_bytes: float
    """Bytes read and written per second by a copy."""
    attention_flops: tuple[tuple[int, float], ...]
    """(keys, FLOP/s of forward and backward) of a library's attention, by rising keys."""


def floor_seconds(
    model: str,
    grid: TokenGrid,
    *,
    hidden_size: int,
    depth: int,
    parameters: int,
    micro_batch: int,
    ceilings: Ceilings,
    text_tokens: int = 120,
    mlp_ratio: float = 4.0,
) -> float:
    """Seconds of a training step per sample: forward, backward and a micro-batch's share of the
    optimizer.

    Per token and block: products 6 · (weights) FLOPs, attention 3.5 · 4 D FLOPs per key, passes of
    2 D bytes; per step 36 bytes a parameter.

    Raises ValueError for an unknown model.
    """
    if model not in _PASSES:
        raise ValueError(f"model={model} has no floor: expected one of {', '.join(_PASSES)}")
    token_blocks = depth * grid.total
    bytes_per_pass = token_blocks * hidden_size * _BYTES

    seconds = token_blocks * _weight_flops(model, hidden_size, mlp_ratio) / ceilings.linear_flops
    seconds += bytes_per_pass * _PASSES[model] / ceilings.copy_bytes
    for share, keys, is_temporal in _attentions(model, grid, text_tokens, depth):
        if is_temporal and keys <= _SHORT_SEQUENCE:
            seconds += share * bytes_per_pass * _TEMPORAL_TENSORS / ceilings.copy_bytes
        else:
            flops = share * token_blocks * _ATTENTION_PASSES * 4 * hidden_size * keys
            seconds += flops / attention_rate(ceilings, keys)
    return seconds + parameters * _OPTIMIZER_BYTES / ceilings.copy_bytes / micro_batch


def attention_rate(ceilings: Ceilings, keys: int) -> float:
    """FLOP/s at this many keys: between measured numbers of keys by their logarithm."""
    points = ceilings.attention_flops
    assert points, "ceilings without a rate of attention"
    if keys <= points[0][0]:
        return points[0][1]
    for (fewer, low), (more, high) in pairwise(points):
        if keys <= more:
            return low + (high - low) * math.log(keys / fewer) / math.log(more / fewer)
    return points[-1][1]


def _weight_flops(model: str, hidden_size: int, mlp_ratio: float) -> float:
    """Training FLOPs of a block's weights per token: 6 per multiply-add."""
    projections = {"dit": 4, "latte": 4, "pixart": 6, "stdit": 10, "stdit2": 10}[model]
    return 6 * (projections + 2 * mlp_ratio) * hidden_size**2


def _attentions(
    model: str, grid: TokenGrid, text_tokens: int, depth: int
) -> list[tuple[float, int, bool]]:
    """Each kind of attention: the share of blocks that have it, its keys, whether over time."""
    match model:
        case "dit":
            return [(1, grid.total, False)]
        case "latte":
            temporal = (depth // 2) / depth
            return [(1 - temporal, grid.space, False), (temporal, grid.time, True)]
        case "pixart":
            return [(1, grid.total, False), (1, text_tokens, False)]
    return [(1, grid.space, False), (1, grid.time, True), (1, text_tokens, False)]
