"""What test_compiled_kernels compiles of flash attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from longtake.ops.flash_attention import launch_backward, launch_forward

# (tokens, heads, head size, dtype): tiles that N fills or not, heads with and without a tail.
SIZES = [
    (256, 16, 72, torch.bfloat16),
    (8160, 16, 72, torch.bfloat16),
    (37, 16, 72, torch.bfloat16),
    (1, 16, 72, torch.bfloat16),
    (256, 16, 64, torch.bfloat16),
    (64, 4, 32, torch.bfloat16),
    (200, 16, 128, torch.bfloat16),
    (256, 16, 72, torch.float32),
]


def compile_cases() -> list[tuple[str, Callable[[], object]]]:
    """(name, launch) of forward and backward."""
    cases = []
    for num_tokens, num_heads, head_size, dtype in SIZES:
        qkv = torch.zeros(1, num_tokens, 3, num_heads, head_size, dtype=dtype)
        out = torch.zeros(1, num_tokens, num_heads, head_size, dtype=dtype)
        lse = torch.zeros(1, num_heads, num_tokens)
        name = f"flash_attention-{num_tokens}-{head_size}-{str(dtype)[6:]}"
        cases.append((name, partial(launch_forward, qkv)))
        cases.append((f"{name}-backward", partial(launch_backward, out, qkv, out, lse)))
    return cases
