"""What test_compiled_kernels compiles of temporal attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from longtake.ops.temporal_attention_kernel import launch_backward, launch_forward

# (frames, head size, dtype): each form of tile, heads with and without a rest.
SIZES = [
    (1, 72, torch.bfloat16),
    (16, 72, torch.bfloat16),
    (16, 64, torch.bfloat16),
    (17, 72, torch.bfloat16),
    (64, 72, torch.bfloat16),
    (64, 64, torch.bfloat16),
    (128, 72, torch.bfloat16),
    (16, 72, torch.float16),
    (64, 128, torch.bfloat16),
    (16, 72, torch.float32),
    (32, 72, torch.float32),
]


def compile_cases() -> list[tuple[str, Callable[[], object]]]:
    """(name, launch) of forward and backward."""
    cases = []
    for num_frames, head_size, dtype in SIZES:
        qkv = torch.zeros(1, num_frames, 5, 3, 16, head_size, dtype=dtype)
        dout = torch.zeros(1, num_frames, 5, 16, head_size, dtype=dtype)
        name = f"temporal_attention-{num_frames}-{head_size}-{str(dtype)[6:]}"
        cases.append((name, partial(launch_forward, qkv)))
        cases.append((f"{name}-backward", partial(launch_backward, dout, qkv)))
    return cases
