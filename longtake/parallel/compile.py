"""torch.compile of the blocks, in place: one small graph that all blocks of a kind share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

# Every bucket's shape, every kind of block and training versus inference is a graph of its own.
# Above the limit `fullgraph` raises; PyTorch's default of 8 would be met by four buckets of a
# two-branch block.
_MAX_GRAPHS = 256
# Not sums over tokens in the kernel of sums over channels: with one sample in the micro-batch the
# gradients of a norm's shift and scale were wrong, without a word (PyTorch 2.11, docs/log.md).
COMPILER_OPTIONS: dict[str, Any] = {"triton.mix_order_reduction": False}


def compile_blocks(blocks: Iterable[nn.Module], *, backend: str | Callable = "inductor") -> None:
    """Compiles the forward of each block in place, on its first call; parameter names stay.

    The forward and not the module: FSDP's hooks on the module stay outside of the graph. Shapes are
    static, since a bucket's shape never changes and static kernels are faster. A block that cannot
    be captured whole is an error, not a silent fallback to eager.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    options = COMPILER_OPTIONS if backend == "inductor" else None
    for block in blocks:
        block.forward = torch.compile(
            block.forward, fullgraph=True, dynamic=False, backend=backend, options=options
        )


def overlap_exchanges() -> None:
    """Makes what is compiled from now on begin exchanges as soon, and wait for them as late, as it
    can."""
    # Else the compiler orders for the least memory, which puts a wait right behind its send.
    from torch._inductor import config as inductor  # takes seconds

    inductor.reorder_for_compute_comm_overlap = True
    inductor.reorder_for_compute_comm_overlap_passes = ["sink_waits", "raise_comms"]
