"""Activation checkpointing: trade memory for recomputation, block by block."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

CheckpointingPolicy = Literal["none", "selective", "full"]


def checkpoint_blocks(blocks: Iterable[nn.Module], policy: CheckpointingPolicy) -> None:
    """Makes each block keep less in the forward and compute the rest again in the backward.

    "selective" recomputes what passes over the same memory give for one more write: normalized
    tokens and activations. "full" keeps a block's input alone. Branches have a switch `recompute`
    for the first. For the second the forward of the instance is wrapped, not the module: parameter
    names stay what they are, and hooks on the module (those of FSDP) run once, not again in the
    recomputation.
    """
    for block in blocks:
        for module in block.modules():
            if hasattr(module, "recompute"):
                module.recompute = policy == "selective"  # pyright: ignore[reportArgumentType]
        if policy == "full":
            # Nothing in a block draws from the global generators, so their state need not be kept.
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
