"""What test_compiled_kernels compiles of flash attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from longtake.ops.flash_attention import launch_backward, launch_forward

# (tokens, head size, dtype): each form of tiles, which N fills or not, and heads with and without a
# tail.
SIZES = [
    (1, 72, torch.bfloat16),
    (37, 72, torch.bfloat16),
    (256, 72, torch.bfloat16),
    (360, 72, torch.bfloat16),
    (1024, 72, torch.bfloat16),
    (8160, 72, torch.bfloat16),
    (256, 64, torch.bfloat16),
    (64, 32, torch.bfloat16),
    (1000, 128, torch.bfloat16),
    (256, 72, torch.float32),
]


def compile_cases() -> list[tuple[str, Callable[[], object]]]:
    """(name, launch) of forward and backward."""
    return [
        (
            f"flash_attention-{num_tokens}-{head_size}-{str(dtype)[6:]}",
            partial(_launch, torch.zeros(1, num_tokens, 3, 16, head_size, dtype=dtype)),
        )
        for num_tokens, head_size, dtype in SIZES
    ]


def _launch(qkv: torch.Tensor) -> None:
    out, lse = launch_forward(qkv)
    launch_backward(torch.zeros_like(out), qkv, out, lse)
