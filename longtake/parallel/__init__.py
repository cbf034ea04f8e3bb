"""Makes a finished model sequence-parallel, sharded, checkpointed and compiled, and owns the
processes it runs on."""

from longtake.parallel.activation_checkpointing import BY_BLOCK
from longtake.parallel.branches import PIECE_TOKENS
from longtake.parallel.collectives import (
    PeerError,
    any_process,
    gather_json,
    mean_over_processes,
    run_together,
)
from longtake.parallel.compile import compile_blocks
from longtake.parallel.exchange import TokenGroup, gather_rows
from longtake.parallel.mesh import (
    COLLECTIVE_MARGIN_SECONDS,
    Mesh,
    ParallelConfig,
    attention_degrees,
    blocks_per_unit,
    build_mesh,
    compute_dtype,
    may_be_restarted,
    start_distributed,
    stop_distributed,
)
from longtake.parallel.parallelize import is_compiled, parallelize
from longtake.parallel.shard import (
    drop_gathered,
    gathered_copies,
    global_norm,
    local_part,
    local_parts,
    materialize,
    read_full,
    shard_blocks,
    sum_over_shards,
    sync_gradients,
    write_full,
)

__all__ = [
    "BY_BLOCK",
    "COLLECTIVE_MARGIN_SECONDS",
    "PIECE_TOKENS",
    "Mesh",
    "ParallelConfig",
    "PeerError",
    "TokenGroup",
    "any_process",
    "attention_degrees",
    "blocks_per_unit",
    "build_mesh",
    "compile_blocks",
    "compute_dtype",
    "drop_gathered",
    "gather_json",
    "gather_rows",
    "gathered_copies",
    "global_norm",
    "is_compiled",
    "local_part",
    "local_parts",
    "materialize",
    "may_be_restarted",
    "mean_over_processes",
    "parallelize",
    "read_full",
    "run_together",
    "shard_blocks",
    "start_distributed",
    "stop_distributed",
    "sum_over_shards",
    "sync_gradients",
    "write_full",
]
