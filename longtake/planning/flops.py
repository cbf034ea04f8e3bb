"""Floating-point operations of a transformer by formula, and the share of the peak they reach.

Counted are the matrix products of the blocks: weights and attention. Biases, norms, softmax,
embedders, the final layer and the projections of the text (L is small beside N) are not.

Letters as in the models: D hidden size, T patches in time, S patches per frame, N = T · S tokens,
L text tokens.
"""

from __future__ import annotations

from longtake.planning.tokens import TokenGrid, has_full_attention

MODELS = ("dit", "latte", "pixart", "stdit", "stdit2")

_FLOPS_PER_MAC = 2
# The backward pass multiplies twice, for the gradients of inputs and of weights.
_TRAINING_PASSES = 3


def forward_macs(
    model: str,
    grid: TokenGrid,
    *,
    hidden_size: int,
    depth: int,
    text_tokens: int = 120,
    mlp_ratio: float = 4.0,
) -> float:
    """Multiply-adds of one forward pass over one sample.

    Per token and block, with an MLP ratio of 4 (8 D² of each first term):

        dit            12 D² + 2 D N              self-attention over all tokens
        latte          12 D² + 2 D S  or  T       even blocks within a frame, odd ones across frames
        pixart         14 D² + 2 D (N + L)        and cross-attention to the text
        stdit, stdit2  18 D² + 2 D (S + T + L)    spatial, temporal and cross-attention

    An attention has 4 D² of projections (2 D² if its keys come from the text) and 2 D per key.
    `dit` and `latte` see no text and ignore `text_tokens`.

    Raises ValueError for an unknown model.
    """
    projections, keys = _attention(model, grid, depth=depth, text_tokens=text_tokens)
    weights = (projections + 2 * mlp_ratio) * hidden_size**2
    return depth * grid.total * (weights + 2 * hidden_size * keys)


def attention_macs(
    model: str, grid: TokenGrid, *, hidden_size: int, depth: int, least_keys: int
) -> float:
    """Of those, what self-attention over so many keys or more takes beside its projections."""
    keys, blocks = (grid.space, grid.time), [depth, depth]
    if has_full_attention(model):
        keys, blocks = (grid.total,), [depth]
    elif model == "latte":
        blocks = [depth - depth // 2, depth // 2]
    met = sum(n * count for n, count in zip(keys, blocks, strict=True) if n >= least_keys)
    return 2 * hidden_size * grid.total * met


def training_flops(forward_macs: float, *, recompute: bool = False) -> float:
    """FLOPs of one training step per sample: 6 per forward multiply-add.

    With `recompute`, 8: what the hardware executes when every block runs forward twice. Utilization
    is quoted with 6: recomputing is a cost, not work done.
    """
    passes = _TRAINING_PASSES + (1 if recompute else 0)
    return _FLOPS_PER_MAC * passes * forward_macs


def model_flops_utilization(
    *,
    flops_per_sample: float,
    samples_per_second: float,
    num_gpus: int,
    peak_flops: float | None,
) -> float | None:
    """MFU: the share of the peak spent on the model's own arithmetic; None if the peak is unknown.

    `flops_per_sample` comes from `training_flops` without recomputing. `samples_per_second` is that
    of all `num_gpus` together, every GPU of a sequence-parallel group counted. `peak_flops` is one
    GPU's, per second.
    """
    if peak_flops is None:
        return None
    return flops_per_sample * samples_per_second / (num_gpus * peak_flops)


def _attention(model: str, grid: TokenGrid, *, depth: int, text_tokens: int) -> tuple[int, float]:
    """Attention's weights per token and block in units of D², and the keys that a token meets."""
    match model:
        case "dit":
            return 4, grid.total
        case "latte":
            temporal = depth // 2
            return 4, ((depth - temporal) * grid.space + temporal * grid.time) / depth
        case "pixart":
            return 6, grid.total + text_tokens
        case "stdit" | "stdit2":
            return 10, grid.space + grid.time + text_tokens
    raise ValueError(f"model={model} has no FLOPs formula: expected one of {', '.join(MODELS)}")
