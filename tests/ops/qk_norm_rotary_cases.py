"""What test_compiled_kernels compiles of qk_norm_rotary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from longtake.ops.qk_norm_rotary_kernel import launch_backward, launch_forward


def compile_cases() -> list[tuple[str, Callable[[], object]]]:
    """(name, launch) of forward and backward for heads of the sizes XL and S, B, L."""
    cases = []
    for head_size in (72, 64):
        for dtype, with_angles in ((torch.bfloat16, True), (torch.bfloat16, False)):
            qkv = torch.zeros(2, 16, 8, 3, 16, head_size, dtype=dtype)
            weight_E = torch.ones(head_size, dtype=dtype)
            angles = torch.zeros(16, head_size).chunk(2, dim=1) if with_angles else (None, None)
            rest = (qkv, weight_E, weight_E, *angles, 1e-6)
            name = f"qk_norm_rotary-{head_size}-{'turned' if with_angles else 'norm'}"
            cases.append((f"{name}-forward", partial(launch_forward, *rest)))
            cases.append((f"{name}-backward", partial(launch_backward, qkv, *rest)))
    return cases
