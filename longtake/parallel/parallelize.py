"""The one orchestrator: decides what is done to a finished model, and in which order."""

from __future__ import annotations

import torch
from torch import nn

from longtake.parallel.activation_checkpointing import checkpoint_blocks
from longtake.parallel.branches import branches_of
from longtake.parallel.compile import compile_blocks, overlap_exchanges
from longtake.parallel.mesh import Mesh, ParallelConfig, blocks_per_unit, compute_dtype
from longtake.parallel.sequence import split_sequence
from longtake.parallel.shard import shard_blocks


def parallelize(model: nn.Module, mesh: Mesh, config: ParallelConfig) -> nn.Module:
    """Makes a model sequence-parallel, checkpointed, compiled and sharded as the config says, in
    place, and returns it.

    The model is best still on the meta device; then come `materialize` and the weights. The order
    matters: recomputation calls what is compiled, and weights are gathered outside of both. All
    processes of the run must call it together.
    """
    blocks = model.blocks
    assert isinstance(blocks, nn.ModuleList), "a model's blocks are its units of sharding"
    if config.kept_blocks > len(blocks):
        raise ValueError(
            f"parallel.kept_blocks={config.kept_blocks}: the model has {len(blocks)} blocks"
        )
    checkpointed = len(blocks) - config.kept_blocks
    if config.kept_inputs > checkpointed:
        raise ValueError(
            f"parallel.kept_inputs={config.kept_inputs}: {checkpointed} of the model's "
            f"{len(blocks)} blocks are checkpointed; for all of them parallel.offload=False does it"
        )
    # Tokens travel within what is compiled; but where branches run in pieces, around all of them.
    nested = config.checkpointing == "nested"
    if not nested:
        _split(model, mesh, config)
    if is_compiled(config, mesh.device):
        if config.exchange_in_halves:
            overlap_exchanges()
        compile_blocks(branch for b in blocks for branch in (branches_of(b) if nested else (b,)))
    # Around the graph: within it, PyTorch 2.11 keeps whatever the operations with a backward of
    # their own save, which is nearly everything.
    checkpoint_blocks(
        blocks,
        config.checkpointing,
        offload=config.offload,
        kept_inputs=config.kept_inputs,
        kept_blocks=config.kept_blocks,
        pieces=config.pieces,
    )
    if nested:
        _split(model, mesh, config)
    shard_blocks(
        model,
        blocks,
        mesh.fsdp_mesh,
        param_dtype=compute_dtype(config, mesh.device),
        # Without others to share with, gathering and reducing more often gains nothing.
        reshard_after_forward=config.zero == 3 and mesh.num_shards > 1,
        accumulate_shards=config.zero >= 2 and mesh.num_shards > 1,
        blocks_per_unit=blocks_per_unit(
            config, len(blocks), shards=mesh.num_shards, processes=mesh.world_size
        ),
    )
    return model


def _split(model: nn.Module, mesh: Mesh, config: ParallelConfig) -> None:
    if mesh.token_group is not None:
        split_sequence(model, mesh.token_group, in_halves=config.exchange_in_halves)


def is_compiled(config: ParallelConfig, device: torch.device) -> bool:
    """Whether blocks are compiled on this device."""
    return device.type == "cuda" if config.compile is None else config.compile
