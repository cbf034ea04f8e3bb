"""Activation checkpointing: trade memory for recomputation, block by block."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Iterable[nn.Module], policy: Literal["none", "full"]) -> None:
    """Makes each block keep only its input in the forward and recompute the rest in the backward.

    The forward of the instance is wrapped, not the module: parameter names stay what they are, and
    hooks on the module (those of FSDP) run once, not again in the recomputation.
    """
    if policy == "none":
        return
    for block in blocks:
        # Nothing in a block draws from the global generators, so their state need not be kept.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
