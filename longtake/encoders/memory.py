"""How much device memory a call takes, measured; and how large a call may be to stay in bounds."""

from __future__ import annotations

from collections.abc import Callable

import torch

_GIB = 2**30


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """By how much a call raises the peak of memory in use on a CUDA device, its result included.

    The allocator counts when the host asks for memory, not when a kernel touches it: nothing has to
    be waited for, and work of other streams does not disturb. The device's peak statistics start
    anew.
    """
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def count_that_fits(*, one: int, two: int, limit_gib: float, what: str) -> int:
    """How many items a call may take, given its peaks in bytes for one and for two of them.

    Raises:
        ValueError: a single one exceeds the limit.
    """
    limit = limit_gib * _GIB
    if one > limit:
        raise ValueError(
            f"encoding one {what} takes {one / _GIB:.2f} GiB, more than video_encoder.memory_gib="
            f"{limit_gib:g}: raise it, or process frames in tiles with video_encoder.tile=256"
        )
    # At least half of two: what does not grow from one to two may do so from ten on.
    each = max(two - one, two // 2, 1)
    return max(1, int(limit // each))
