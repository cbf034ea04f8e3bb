"""Activation checkpointing: trade memory for recomputation, block by block."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from longtake.parallel.branches import Pieces, branches_of, is_in_pieces, run_in_pieces
from longtake.parallel.offload import StreamOffload

CheckpointingPolicy = Literal["none", "selective", "full", "nested"]
BY_BLOCK = ("full", "nested")
"""Policies under which a block keeps its input alone."""


def checkpoint_blocks(
    blocks: nn.ModuleList,
    policy: CheckpointingPolicy,
    *,
    offload: bool = False,
    kept_inputs: int = 0,
    kept_blocks: int = 0,
    pieces: Pieces = "all",
) -> None:
    """Makes each block keep less in the forward and compute the rest again in the backward.

    "selective" recomputes what passes over the same memory give for one more write: normalized
    tokens and activations. "full" keeps a block's input alone; so does "nested", and of a block
    computed again each branch of those in `pieces` keeps its inputs and what attention over many
    keys found, to be computed once more, but for that attention, in pieces of the tokens. With
    `offload` the inputs of blocks wait for the backward in host memory, but the last `kept_inputs`
    of them. The last `kept_blocks` blocks, whose backward comes first, are "selective" all the
    same.

    Branches have a switch `recompute` for the first. For the others the forward of the instance is
    wrapped, not the module: parameter names stay what they are, and hooks on the module (those of
    FSDP) run once, not again in the recomputation.
    """
    stream, chosen = StreamOffload(), policy
    for number, block in enumerate(blocks):
        policy = "selective" if number >= len(blocks) - kept_blocks else chosen
        for module in block.modules():
            if hasattr(module, "recompute"):
                module.recompute = policy == "selective"  # pyright: ignore[reportArgumentType]
        if policy == "nested":
            for branch in branches_of(block):
                if is_in_pieces(branch, pieces):
                    run_in_pieces(branch)
        if policy in BY_BLOCK:
            # Nothing in a block draws from the global generators, so their state need not be kept.
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        if offload and policy in BY_BLOCK:
            stays = number >= len(blocks) - kept_blocks - kept_inputs
            block.forward = stream.around(block.forward, is_first=number == 0, stays=stays)
