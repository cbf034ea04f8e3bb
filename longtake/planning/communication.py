"""What processes send one another in a step, by formula: weights and gradients of sharding, tokens
of sequence parallelism.

Letters as in the models: D hidden size, T patches in time, S patches per frame, N = T · S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from longtake.planning.tokens import TokenGrid, has_full_attention


@dataclass(frozen=True)
class ShardingTraffic:
    """Bytes that leave a process in one optimizer step, whichever way a collective takes them."""

    gathered: float
    """Weights, all-gathered within a group that shares one copy."""
    scattered: float
    """Gradients, reduce-scattered within the group."""
    reduced: float
    """Shards of gradients, all-reduced between groups (HSDP)."""

    @property
    def total(self) -> float:
        return self.gathered + self.scattered + self.reduced


def sharding_traffic(
    parameters: int,
    *,
    shards: int,
    replicas: int = 1,
    gathers: int = 2,
    weight_bytes: int = 2,
    gradient_bytes: int = 4,
) -> ShardingTraffic:
    """What FSDP sends, with P parameters over `shards` processes in each of `replicas` groups.

        all-gather      gathers · P · weight_bytes · (shards - 1) / shards
        reduce-scatter  P · gradient_bytes · (shards - 1) / shards
        all-reduce      2 · P / shards · gradient_bytes · (replicas - 1) / replicas

    `gathers` is 2 for each micro-batch of a step, one for the forward and one for the backward, or
    1 where weights stay gathered in between.
    """
    away = (shards - 1) / shards
    return ShardingTraffic(
        gathered=gathers * parameters * weight_bytes * away,
        scattered=parameters * gradient_bytes * away,
        reduced=2 * parameters / shards * gradient_bytes * (replicas - 1) / replicas,
    )


def exchanged_bytes(
    model: str,
    grid: TokenGrid,
    *,
    hidden_size: int,
    depth: int,
    sp: int,
    ring: int = 1,
    bytes_per_value: int = 2,
) -> int:
    """Bytes that a process of a group of sp puts into all-to-alls in one forward over one sample.

    Full attention is spread over sp / ring processes by heads, and over ring processes in a ring.

    In passes of the hidden size over the tokens that a process holds (M / sp, with M = N D values):

        stdit, stdit2  2 per block           the stream, to the temporal branch and back
        latte          2 per temporal block  half of the blocks
        dit, pixart    4 per block           q, k and v, and what was attended to; none where all
                                             sp are a ring

    What fills T, S or N up to multiples of sp travels along and is counted. A share (n - 1) / n of
    the bytes leaves the process, where n processes exchange: sp of them, or sp / ring for dit and
    pixart. The backward sends as much; blocks that are computed again send the forward's once more.

    Raises ValueError for an unknown model.
    """
    if sp == 1:
        return 0
    match model:
        case "stdit" | "stdit2" | "latte":
            tokens = sp * -(-grid.time // sp) * -(-grid.space // sp)
            passes = 2 * (depth // 2 if model == "latte" else depth)
        case "dit" | "pixart":
            tokens = -(-grid.total // sp)
            passes = 0 if ring == sp else 4 * depth
        case _:
            raise ValueError(
                f"model={model} has no formula for sequence parallelism: expected one of dit, "
                "latte, pixart, stdit, stdit2"
            )
    return passes * tokens * hidden_size * bytes_per_value


def forwards_again(
    checkpointing: str, pieces: str, *, kept_share: float = 0, attended_share: float = 0
) -> float:
    """Forwards of the blocks that a step computes beside its first, of those of the whole model.

    "full" computes a block once more; so does "nested", and of a block computed again the branches
    in `pieces` once more each, but the last, at whose door it stops. What of that the MLP and
    attention to text are is left out here: 2 with all pieces, 1 where they alone are. A share of
    the blocks may be kept; of a forward, a share may be attention whose results a branch keeps.
    """
    times = {"full": 1, "nested": 2 - attended_share if pieces == "all" else 1}
    return times.get(checkpointing, 0) * (1 - kept_share)


def exchanges_again(model: str, checkpointing: str, pieces: str, *, kept_share: float = 0) -> float:
    """How often tokens travel again for that, in those of a forward. Around temporal branches they
    do with the block, within full attention with the branch."""
    if not has_full_attention(model):
        pieces = "pointwise"
    return forwards_again(checkpointing, pieces, kept_share=kept_share)


def ring_bytes(
    model: str,
    grid: TokenGrid,
    *,
    hidden_size: int,
    depth: int,
    sp: int,
    ring: int,
    bytes_per_value: int = 2,
) -> int:
    """Bytes that a process sends to the next of its ring in one forward over one sample.

    Keys and values, 2 passes over the tokens that a process holds, ring - 1 times a block. The
    backward sends twice as much: them, and the sums of their gradients.
    """
    if not has_full_attention(model):
        return 0
    tokens = -(-grid.total // sp)
    return 2 * (ring - 1) * depth * tokens * hidden_size * bytes_per_value
