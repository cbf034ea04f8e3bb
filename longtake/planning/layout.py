"""Which grid of processes sends least: every layout of so many GPUs, by formula.

Times are those of the formulas alone: bytes over bandwidth and rounds times latency. Bandwidths,
latency and the rate of arithmetic are inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from longtake.planning.communication import exchanged_bytes, ring_bytes, sharding_traffic
from longtake.planning.memory import PeakMemory
from longtake.planning.tokens import TokenGrid

# Moved by the optimizer for a parameter, as the floor of a step counts it.
_UPDATE_BYTES = 36


@dataclass(frozen=True, kw_only=True)
class Links:
    """What a GPU sends through, per direction, as collectives of large messages reach it."""

    machine_bytes: float = 200e9
    """Bytes per second to another GPU of the same machine."""
    network_bytes: float = 40e9
    """Bytes per second to another machine, for every GPU at once."""
    latency_seconds: float = 5e-6
    """Of one round of a collective."""
    gpus_per_machine: int = 8

    def over(self, size: int, *, stride: int = 1) -> float:
        """Bytes per second of a collective over so many GPUs, every `stride`th in rank.

        A ring over whole machines leaves each through all of its network cards. With strides, as
        many rings share these as there are GPUs between two of one ring.
        """
        if size * stride <= self.gpus_per_machine:
            return self.machine_bytes
        cards = max(1, self.gpus_per_machine // stride)
        return min(self.machine_bytes, self.network_bytes * cards)


@dataclass(frozen=True, kw_only=True)
class LayoutWork:
    """What is trained: the model, a sample's tokens, and the samples of a micro-batch."""

    model: str
    parameters: int
    hidden_size: int
    depth: int
    grid: TokenGrid
    flops_per_sample: float
    peak: Callable[[int, int, int], PeakMemory]
    """Of a process's memory, by the groups that have samples of their own, the processes that share
    one copy of the weights, and those that share tokens."""
    ring: Callable[[int], int] = lambda sp: 1
    """How many of sp processes pass keys and values around."""
    micro_batch: int = 1
    """Samples of one step for each group of processes that share tokens."""
    forwards_again: Callable[[int], float] = lambda ring: 0
    """Beside the first, where so many processes are a ring; see `planning.forwards_again`."""
    exchanges_again: float = 0
    zero: int = 2
    """3 gathers weights twice and frees them in between; with 0 all processes are replicas."""
    blocks_per_unit: int = 1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One grid of processes and what a step on it takes; bytes and seconds of one GPU."""

    dp_replicate: int
    dp_shard: int
    sp: int
    micro_batch: int
    memory: PeakMemory
    compute_seconds: float
    shard_seconds: float
    """All-gathers of weights and reduce-scatters of gradients."""
    replica_seconds: float
    """All-reduces of gradients between replicas."""
    exchange_seconds: float
    """All-to-alls of tokens, and keys and values around rings."""
    update_seconds: float
    """The optimizer's pass over the parameters that this GPU holds."""

    @property
    def samples_at_once(self) -> int:
        """Of all groups."""
        return self.dp_replicate * self.dp_shard * self.micro_batch

    @property
    def exposed_seconds(self) -> float:
        """What comes on top of compute: all that is sent, and the update.

        Weights and gradients travel beside compute, but what they take from it was as much as they
        would have taken by themselves, on two H200s (docs/parallelism.md).
        """
        sent = self.shard_seconds + self.replica_seconds + self.exchange_seconds
        return sent + self.update_seconds

    @property
    def seconds_per_sample(self) -> float:
        """GPU-seconds that a sample takes."""
        return (self.compute_seconds + self.exposed_seconds) * self.sp / self.micro_batch


def layouts(
    gpus: int, work: LayoutWork, *, links: Links, flops_per_second: float, memory_rate: float
) -> list[Layout]:
    """Every layout of so many GPUs, token groups within a machine. `memory_rate` is the bytes that
    a GPU moves in its memory a second."""
    found = []
    for sp in _divisors(min(gpus, links.gpus_per_machine)):
        if gpus % sp:
            continue
        for shards in _divisors(gpus // sp):
            replicas = gpus // sp // shards
            if work.zero == 0 and shards > 1:
                continue  # all are replicas
            found.append(_layout(replicas, shards, sp, work, links, flops_per_second, memory_rate))
    return found


def best_layout(found: list[Layout], *, memory_bytes: float) -> Layout | None:
    """Of those that fit, the one whose GPUs train most samples; None if none fits."""
    fitting = (one for one in found if one.memory.total <= memory_bytes)
    return min(fitting, key=lambda one: one.seconds_per_sample, default=None)


def _layout(
    replicas: int,
    dp_shard: int,
    sp: int,
    work: LayoutWork,
    links: Links,
    flops_per_second: float,
    memory_rate: float,
) -> Layout:
    shards, copies = (1, replicas * sp) if work.zero == 0 else (dp_shard * sp, replicas)
    is_freed = work.zero == 3 and shards > 1
    gathers = 2 if is_freed else 1
    sent = sharding_traffic(work.parameters, shards=shards, replicas=copies, gathers=gathers)
    units = math.ceil(work.depth / work.blocks_per_unit) + 1
    inside = links.over(shards)
    # A ring of n passes on n - 1 times; gathered and once reduced, unit by unit.
    rounds = (gathers + 1) * units * (shards - 1)
    between = links.over(copies, stride=shards)
    tree = units * 2 * math.ceil(math.log2(copies)) if copies > 1 else 0
    ring = work.ring(sp)
    where = {"hidden_size": work.hidden_size, "depth": work.depth, "sp": sp, "ring": ring}
    leaving = exchanged_bytes(work.model, work.grid, **where) * (1 - ring / sp)
    around = ring_bytes(work.model, work.grid, **where)
    again = work.exchanges_again
    of_tokens = work.micro_batch * ((2 + again) * leaving + (3 + again) * around)
    flops = work.micro_batch * work.flops_per_sample * (1 + work.forwards_again(ring) / 3)
    return Layout(
        dp_replicate=replicas,
        dp_shard=dp_shard,
        sp=sp,
        micro_batch=work.micro_batch,
        memory=work.peak(replicas * dp_shard, shards, sp),
        compute_seconds=flops / sp / flops_per_second,
        shard_seconds=(sent.gathered + sent.scattered) / inside + rounds * links.latency_seconds,
        update_seconds=_UPDATE_BYTES * work.parameters / shards / memory_rate,
        replica_seconds=sent.reduced / between + tree * links.latency_seconds,
        exchange_seconds=of_tokens / links.over(sp),
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
