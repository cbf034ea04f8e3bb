"""What self-attention found, kept until the same is computed again.

    with keeping_attended(kept):
        out = branch(x)
    ...
    with giving_attended(kept):
        again = branch(x)  # all but attention

Within the second, attention gives what was kept in place of computing it, in the same order, and
its backward goes on from there. The operations of attention are Python functions also where they
are called from a compiled graph, so this is done in them, and no graph knows of it. Nothing may
write to what they gave: branches run with a graph for both, which saves it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

KEPT_KEYS = 1024
"""The fewest keys for which results are kept. Those of a token take the same memory whatever it
attends to, while computing them takes arithmetic by the key: with fewer, too little to be worth
it."""


class _Thread(threading.local):
    """A backward on a GPU has a thread of its own, in which it also computes again."""

    kept: list[Tensor] | None = None
    given: list[Tensor] | None = None


_now = _Thread()


@contextmanager
def keeping_attended(kept: list[Tensor]) -> Iterator[None]:
    """Appends what attention finds within the context, in this thread."""
    before, _now.kept = _now.kept, kept
    try:
        yield
    finally:
        _now.kept = before


@contextmanager
def giving_attended(kept: list[Tensor]) -> Iterator[None]:
    """Attention within the context, in this thread, takes its results from the front of the list.

    Raises RuntimeError if there are none, or their output has another shape or dtype than what it
    would have computed.
    """
    before, _now.given = _now.given, kept
    try:
        yield
    finally:
        _now.given = before


def keeps_attended(
    attend: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Of qkv (B, N, 3, A, E) the output (B, N, A, E) and what the backward needs of each row of
    scores (B, A, ...), computed or kept."""

    @functools.wraps(attend)
    def attend_or_take(qkv_BN3AE: Tensor) -> tuple[Tensor, Tensor]:
        if qkv_BN3AE.shape[1] < KEPT_KEYS:
            return attend(qkv_BN3AE)
        if _now.given is not None:
            return _take(_now.given, qkv_BN3AE)
        out_BNAE, lse_BAN = attend(qkv_BN3AE)
        if _now.kept is not None:
            # Detached: autograd gives the results themselves a history, and that holds the inputs.
            _now.kept += out_BNAE.detach(), lse_BAN.detach()
        return out_BNAE, lse_BAN

    return attend_or_take


def _take(given: list[Tensor], qkv_BN3AE: Tensor) -> tuple[Tensor, Tensor]:
    B, N, _, A, E = qkv_BN3AE.shape
    if len(given) < 2:
        raise RuntimeError(
            f"attention of {N} keys is computed again, but nothing of it is kept any more: what is "
            f"computed again must be what was computed before, with the same kernels"
        )
    out_BNAE, lse_BAN = given.pop(0), given.pop(0)
    if out_BNAE.shape != (B, N, A, E) or out_BNAE.dtype != qkv_BN3AE.dtype:
        raise RuntimeError(
            f"attention is computed again with an output of {(B, N, A, E)} {qkv_BN3AE.dtype}, but "
            f"kept is one of {tuple(out_BNAE.shape)} {out_BNAE.dtype}: what is computed again must "
            f"be what was computed before"
        )
    return out_BNAE, lse_BAN
