"""What test_compiled_kernels compiles of text_attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from longtake.ops.text_attention_kernel import launch_backward, launch_forward


def compile_cases() -> list[tuple[str, Callable[[], object]]]:
    """(name, launch) for the heads of all sizes of model, short captions and the longest."""
    cases = []
    for head_size in (72, 64, 32):
        for num_keys in (7, 120, 256):
            q = torch.zeros(2, 4096, 2, head_size, dtype=torch.bfloat16)
            kv = torch.zeros(2, num_keys, 2, 2, head_size, dtype=torch.bfloat16)
            mask = torch.ones(2, num_keys, dtype=torch.bool)
            lse = torch.zeros(2, 2, 4096)
            name = f"text_attention-{head_size}-{num_keys}"
            cases.append((name, partial(launch_forward, q, kv, mask)))
            cases.append((f"{name}-backward", partial(launch_backward, q, q, kv, mask, lse)))
    return cases
