"""What sequence parallelism sends between processes, by formula.

Letters as in the models: D hidden size, T patches in time, S patches per frame, N = T · S tokens.
"""

from __future__ import annotations

from longtake.planning.tokens import TokenGrid


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
    if model not in ("dit", "pixart"):
        return 0
    tokens = -(-grid.total // sp)
    return 2 * (ring - 1) * depth * tokens * hidden_size * bytes_per_value
