"""Which processes there are and what each of them does: start-up, the degrees of parallelism and
the device mesh.

One process takes the same path as a thousand: it is a process group of one.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from longtake.parallel.activation_checkpointing import BY_BLOCK, CheckpointingPolicy
from longtake.parallel.branches import Pieces
from longtake.parallel.exchange import TokenGroup
from longtake.parallel.meeting import meet

# What `blocks_per_unit` makes of blocks whose weights stay gathered. One unit is a little faster on
# one machine; of four, only a quarter of what is sent has nothing to be computed beside it.
_UNITS = 4
COLLECTIVE_MARGIN_SECONDS = 60
"""How much longer collectives wait than the run may stand still: what watches the whole run
(`training/watchdog.py`) says more, and is to speak first."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over processes and what each of them computes with.

    dp_replicate × dp_shard × sp must equal the number of processes. With zero 0 all are replicas.
    """

    dp_replicate: int = 1
    """Groups of processes that each hold the whole model; above 1 this is hybrid sharding (HSDP).
    """
    dp_shard: int = -1
    """Data-parallel processes that share one copy of what `zero` shards; -1 takes the rest. With
    sp, the copy is spread over dp_shard × sp processes."""
    zero: Literal[0, 1, 2, 3] = 2
    """What the processes that share a model do not hold whole: 0 nothing, each is a replica (DDP);
    1 moments and averages; 2 gradients, too; 3 weights, too, gathered block by block in forward and
    backward, for models whose weights in bf16 are much of a GPU's memory (docs/parallelism.md)."""
    blocks_per_unit: int | None = None
    """So many blocks are gathered in one message and reduced in one. None: one where weights are
    freed after use (zero 3) or nothing is sent; otherwise a quarter of them, since each message
    holds up what computes beside it, and the fewer the less (docs/parallelism.md)."""
    sp: int = 1
    """Processes that share the tokens of one sample (docs/parallelism.md)."""
    exchange_in_halves: bool = False
    """With sp, temporal branches compute with one half of the places while the other travels: it
    hides half of the exchanges for a pass more over the tokens and twice the launches, and was
    slower where it was timed (docs/parallelism.md)."""
    compile: bool | None = None
    """torch.compile of every block; None means on CUDA only."""
    param_dtype: Literal["bf16", "fp32"] | None = None
    """What the forward and backward compute in (weights and moments stay fp32); None: bf16 on CUDA.
    """
    checkpointing: CheckpointingPolicy = "selective"
    """Activation checkpointing: "none" keeps all that the backward reads; "selective" computes
    normalized tokens and activations again: by count 21 tensors of tokens instead of 27 a block,
    for 6 passes of about 100; "full" keeps each block's input alone, for a third more compute;
    "nested" bounds what a block computed again holds, too, for another forward: each of its
    branches runs in pieces of the tokens and is computed again by itself."""
    kept_blocks: int = 0
    """With checkpointing full or nested: so many blocks, the last, are selective all the same. As
    many as memory holds: each saves its forward of the backward's work (docs/memory.md)."""
    pieces: Pieces = "all"
    """With checkpointing nested, the branches that run in pieces and once more: all; or pointwise,
    the MLP and attention to text alone. The tensors of one block's self-attention then are there at
    a time (13 of STDiT's 27), and its forward runs twice, not three times. With all, attention over
    1,024 keys or more by itself does, too (docs/parallelism.md)."""
    offload: bool = False
    """Keep the inputs of blocks in host memory from forward to backward; for checkpointing full or
    nested."""
    kept_inputs: int = 0
    """With offload: of so many checkpointed blocks, the last, the inputs stay on the GPU all the
    same. As many as memory holds: each spares its size of pinned memory, and the way there and
    back."""
    timeout_seconds: int = 600
    """How long anything may take (a forward with its backward, a save, the wait for a batch or for
    another process) before the run is given up as hung."""

    def __post_init__(self) -> None:
        if self.timeout_seconds < 1:
            raise ValueError(
                f"parallel.timeout_seconds={self.timeout_seconds} must be at least 1: it is how "
                "long nothing may move before the run is given up as hung"
            )
        if self.blocks_per_unit is not None and self.blocks_per_unit < 1:
            raise ValueError(
                f"parallel.blocks_per_unit={self.blocks_per_unit} must be at least 1, or None for "
                "a number that suits parallel.zero"
            )
        if self.kept_blocks < 0 or (self.kept_blocks and self.checkpointing not in BY_BLOCK):
            raise ValueError(
                f"parallel.kept_blocks={self.kept_blocks} with parallel.checkpointing="
                f"{self.checkpointing}: expected 0, or with {' or '.join(BY_BLOCK)} a number of "
                "blocks that are not checkpointed"
            )
        if self.pieces != "all" and self.checkpointing != "nested":
            raise ValueError(
                f"parallel.pieces={self.pieces} with parallel.checkpointing={self.checkpointing}: "
                "only with nested do branches run in pieces"
            )
        if self.offload and self.checkpointing not in BY_BLOCK:
            raise ValueError(
                f"parallel.offload takes what checkpointed blocks keep to host memory, but "
                f"parallel.checkpointing={self.checkpointing} does not checkpoint blocks: use "
                f"{' or '.join(BY_BLOCK)}"
            )
        if self.kept_inputs < 0 or (self.kept_inputs and not self.offload):
            raise ValueError(
                f"parallel.kept_inputs={self.kept_inputs} with parallel.offload={self.offload}: "
                "expected 0, or with offload a number of blocks whose inputs stay on the GPU"
            )


@dataclass(frozen=True)
class Mesh:
    """The processes of a run as a grid, checked once by `build_mesh`.

    dp_rank counts the processes that see different samples: 0 <= dp_rank < dp_size. The processes
    of one sequence-parallel group share a dp_rank.
    """

    dp_replicate: int
    dp_shard: int
    sp: int
    rank: int
    world_size: int
    device: torch.device
    device_mesh: DeviceMesh
    """Of the weights: axes dp_replicate, dp_shard_sp. The processes that share tokens are further
    shards; with zero 0, further replicas."""
    token_group: TokenGroup | None  # None without sequence parallelism
    timeout_seconds: int

    @property
    def dp_size(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp

    @property
    def num_shards(self) -> int:
        """Processes that share one copy of the weights."""
        return self.device_mesh.size(1)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that logs and writes the run's single files."""
        return self.rank == 0

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """What `fully_shard` wants: one axis for plain sharding, two for hybrid sharding."""
        is_replicated = self.device_mesh.size(0) > 1
        return self.device_mesh if is_replicated else self.device_mesh["dp_shard_sp"]

    def new_token_group(self) -> TokenGroup | None:
        """The same processes as the token group's, in a process group of its own (see
        `with_own_groups`); all processes must call it together."""
        return _token_group(self.sp, self.rank, self.timeout_seconds)

    def with_own_groups(self) -> Mesh:
        """The same grid over process groups of its own; all processes must call it together.

        Collectives of one group run in the order in which the host gave them out. What works beside
        the training, on another stream, would hold the training's up in a group that they share.
        """
        shape = self.device_mesh.mesh.shape
        return replace(self, device_mesh=_device_mesh(shape, self.device, self.timeout_seconds))


def start_distributed(
    device: Literal["auto", "cpu", "cuda"] = "auto", *, timeout_seconds: int = 600
) -> torch.device:
    """Joins the processes that torchrun started, or makes a group of one, and returns this one's
    device.

    CPU tensors travel over gloo and CUDA tensors over NCCL; a collective fails that waits
    `COLLECTIVE_MARGIN_SECONDS` longer than `timeout_seconds`. `kill -USR2 <pid>` prints where each
    thread of a process is.

    Raises: ValueError for `device="cuda"` where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device='cuda' but PyTorch sees no CUDA device: use device='cpu', or check the driver "
            "with `longtake doctor`"
        )
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if sys.__stderr__ is not None:
        # The real one: a notebook's has no file descriptor.
        faulthandler.enable(sys.__stderr__)
        if hasattr(signal, "SIGUSR2"):
            faulthandler.register(signal.SIGUSR2, sys.__stderr__, all_threads=True)

    if kind == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(own)
    else:
        own = torch.device("cpu")
    if dist.is_initialized():
        return own

    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    timeout = _collective_timeout(timeout_seconds)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # The first process holds the store itself where no torchrun does.
        is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = meet(rank, world_size, timeout) if is_kept else None
        dist.init_process_group(
            backend,
            init_method=None if is_kept else "env://",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    else:
        # An in-memory store: nothing to bind, so that any number of runs share a machine.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return own


def may_be_restarted() -> bool:
    """Whether torchrun runs the same command again if a process fails."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def stop_distributed() -> None:
    """Leaves the process group; harmless if there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def build_mesh(config: ParallelConfig, device: torch.device | None = None) -> Mesh:
    """The grid of all processes. Needs `start_distributed` first, whose result is `device`.

    Raises: ValueError if the degrees do not multiply to the number of processes.
    """
    assert dist.is_initialized(), "call start_distributed before build_mesh"
    device = device if device is not None else torch.device("cpu")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dp_replicate, dp_shard = resolve_degrees(config, world_size)
    shape = (world_size, 1) if config.zero == 0 else (dp_replicate, dp_shard * config.sp)
    device_mesh = _device_mesh(shape, device, config.timeout_seconds)
    return Mesh(
        dp_replicate=dp_replicate,
        dp_shard=dp_shard,
        sp=config.sp,
        rank=rank,
        world_size=world_size,
        device=device,
        device_mesh=device_mesh,
        token_group=_token_group(config.sp, rank, config.timeout_seconds),
        timeout_seconds=config.timeout_seconds,
    )


def _device_mesh(shape: tuple[int, ...], device: torch.device, timeout_seconds: int) -> DeviceMesh:
    """The axes of the weights, over process groups of their own."""
    # Made one by one: `init_device_mesh` gives them no timeout, and takes over a group that has all
    # processes in it.
    ranks, groups = torch.arange(dist.get_world_size()).view(shape), []
    for axis, size in enumerate(shape):
        for row in ranks.movedim(axis, -1).reshape(-1, size).tolist():
            group = dist.new_group(row, timeout=_collective_timeout(timeout_seconds))
            if dist.get_rank() in row:
                groups.append(group)
    names = ("dp_replicate", "dp_shard_sp")
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=names)


def _collective_timeout(timeout_seconds: int) -> timedelta:
    return timedelta(seconds=timeout_seconds + COLLECTIVE_MARGIN_SECONDS)


def _token_group(sp: int, rank: int, timeout_seconds: int) -> TokenGroup | None:
    """Neighbours, on one machine as far as it goes: they exchange tokens in every block."""
    if sp == 1:
        return None
    timeout = _collective_timeout(timeout_seconds)
    group, _ = dist.new_subgroups(sp, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return TokenGroup(name=group.group_name, size=sp, rank=rank % sp, timeout=timeout)


def attention_degrees(sp: int, num_heads: int) -> tuple[int, int]:
    """Over how many processes attention over all tokens is spread by heads, and over how many in a
    ring; their product is sp.

    As many by heads as divide them: what those exchange does not grow with their number, while in a
    ring each process sends its keys and values to every other.
    """
    by_heads = math.gcd(sp, num_heads)
    return by_heads, sp // by_heads


def divide_group(group: TokenGroup, num_heads: int) -> tuple[TokenGroup | None, TokenGroup | None]:
    """The processes with which this one exchanges heads for tokens, and those of its ring; None
    where it would be alone. All processes of the run must call it together.

        6 processes, 2 heads       ring
                                 0   2   4      Neighbours exchange, which cannot hide; around the
                        heads    1   3   5      ring, keys travel while others are attended to.
    """
    by_heads, in_ring = attention_degrees(group.size, num_heads)
    if in_ring == 1:
        return group, None
    if by_heads == 1:
        return None, group
    ranks = torch.arange(dist.get_world_size()).view(-1, in_ring, by_heads)
    rings = ranks.transpose(1, 2).reshape(-1, in_ring).tolist()
    heads, _ = dist.new_subgroups(by_heads, timeout=group.timeout)
    ring, _ = dist.new_subgroups_by_enumeration(rings, timeout=group.timeout)
    assert isinstance(heads, dist.ProcessGroup)
    assert isinstance(ring, dist.ProcessGroup)
    ring_rank, heads_rank = divmod(group.rank, by_heads)
    return (
        TokenGroup(heads.group_name, by_heads, heads_rank, group.timeout),
        TokenGroup(ring.group_name, in_ring, ring_rank, group.timeout),
    )


def resolve_degrees(config: ParallelConfig, world_size: int) -> tuple[int, int]:
    """(dp_replicate, dp_shard) for this many processes, with -1 filled in.

    Raises: ValueError naming the degree that does not fit and those that would.
    """
    for name in ("dp_replicate", "sp"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if config.dp_shard < 1 and config.dp_shard != -1:
        raise ValueError(f"dp_shard={config.dp_shard} must be at least 1, or -1 for the rest")
    if world_size % config.sp:
        raise ValueError(
            f"sp={config.sp} must divide the {world_size} processes: use one of "
            f"{_divisors(world_size)}, or start a multiple of {config.sp} processes"
        )
    dp_size = world_size // config.sp
    of_groups = "" if config.sp == 1 else f" / sp={config.sp}"
    if config.zero == 0:
        if config.dp_replicate not in (1, dp_size) or config.dp_shard not in (-1, 1):
            raise ValueError(
                f"zero=0 makes every process a replica, which leaves nothing to "
                f"dp_replicate={config.dp_replicate} and dp_shard={config.dp_shard}: leave both "
                "unset, or use zero=1, 2 or 3"
            )
        return dp_size, 1
    if config.dp_shard == -1:
        if dp_size % config.dp_replicate:
            raise ValueError(
                f"dp_replicate={config.dp_replicate} must divide the {world_size} "
                f"processes{of_groups}: use one of {_divisors(dp_size)}"
            )
        return config.dp_replicate, dp_size // config.dp_replicate
    if config.dp_replicate * config.dp_shard != dp_size:
        raise ValueError(
            f"dp_replicate={config.dp_replicate} × dp_shard={config.dp_shard} must equal the "
            f"{world_size} processes{of_groups}: change one of them, use dp_shard=-1 for the rest, "
            f"or start {config.dp_replicate * config.dp_shard * config.sp} processes"
        )
    return config.dp_replicate, config.dp_shard


def blocks_per_unit(config: ParallelConfig, depth: int, *, shards: int, processes: int) -> int:
    """How many of a model's blocks are one unit of sharding, of `processes` in all."""
    if config.blocks_per_unit is not None:
        return min(config.blocks_per_unit, depth)
    is_freed = config.zero == 3 and shards > 1
    return 1 if is_freed or processes == 1 else -(-depth // _UNITS)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def compute_dtype(config: ParallelConfig, device: torch.device) -> torch.dtype:
    """What the forward and backward compute in on this device."""
    name = config.param_dtype or ("bf16" if device.type == "cuda" else "fp32")
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
