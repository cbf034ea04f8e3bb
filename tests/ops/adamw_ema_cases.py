"""What test_compiled_kernels compiles of adamw_ema."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from longtake.ops.adamw_ema import adamw_ema, squared_norm


def compile_cases() -> list[tuple[str, Callable[[], object]]]:
    """(name, launch) of both kernels with gradients of both dtypes."""
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        lists = [[torch.zeros(5), torch.zeros(4000)] for _ in range(5)]
        lists[1] = [gradient.to(dtype) for gradient in lists[1]]
        update = partial(
            adamw_ema,
            *lists,
            [torch.zeros(()), torch.zeros(())],
            clip_factor=torch.ones(()),
            applied=torch.ones(()),
            lr=1e-4,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.01,
            ema_rate=1e-4,
        )
        cases.append((f"adamw_ema-{dtype}", update))
        copies = [param.bfloat16() for param in lists[0]]
        cases.append((f"adamw_ema-{dtype}-copies", partial(update, copies=copies)))
        cases.append((f"squared_norm-{dtype}", partial(squared_norm, lists[1])))
    return cases
