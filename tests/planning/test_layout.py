from __future__ import annotations

from dataclasses import replace

import pytest

from longtake.planning import (
    LayoutWork,
    Links,
    PeakMemory,
    TokenGrid,
    best_layout,
    exchanges_again,
    forwards_again,
    layouts,
)


def peak(groups, shards, sp):
    """States over those who share them, 20 GB of activations over those who share tokens."""
    nothing = dict.fromkeys(("gathered", "gradients", "working"), 0.0)
    return PeakMemory(states=16 * 760e6 / shards, kept=20e9 / sp, **nothing)


# STDiT-XL/2 at 64x512 with every block recomputed.
WORK = LayoutWork(
    model="stdit",
    parameters=760_000_000,
    hidden_size=1152,
    depth=28,
    grid=TokenGrid(64, 1024),
    flops_per_sample=290e12,
    peak=peak,
    forwards_again=lambda ring: 1,
    exchanges_again=1,
)
LINKS = Links(machine_bytes=200e9, network_bytes=40e9, latency_seconds=0.0, gpus_per_machine=8)


def _layouts(gpus, work=WORK, links=LINKS):
    found = layouts(gpus, work, links=links, flops_per_second=400e12, memory_rate=4e12)
    return {(one.dp_replicate, one.dp_shard, one.sp): one for one in found}


def test_every_layout_fills_the_gpus_and_keeps_token_groups_in_a_machine():
    for gpus in (1, 8, 12, 64):
        found = _layouts(gpus)
        assert all(replicas * shards * sp == gpus for replicas, shards, sp in found)
        assert max(sp for *_, sp in found) == {1: 1, 8: 8, 12: 4, 64: 8}[gpus]
    assert _layouts(1).keys() == {(1, 1, 1)}


def test_times_are_bytes_over_bandwidth():
    found = _layouts(16)
    sharded = found[1, 8, 2]
    # 6 bytes a parameter, but for the sixteenth that is there; a machine leaves by eight cards.
    assert sharded.shard_seconds == pytest.approx(6 * 760e6 * 15 / 16 / 200e9)
    freed = _layouts(16, replace(WORK, zero=3))[1, 8, 2]
    assert freed.shard_seconds == pytest.approx(8 * 760e6 * 15 / 16 / 200e9)
    assert sharded.replica_seconds == 0
    exchanged = 3 * 56 * (32 * 1024 * 1152 * 2) / 2
    assert sharded.exchange_seconds == pytest.approx(exchanged / 200e9)
    assert sharded.compute_seconds == pytest.approx(4 / 3 * 290e12 / 2 / 400e12)
    # Replicas two machines apart: each GPU has a card of its own for an eighth of the gradients.
    hybrid = found[2, 8, 1]
    assert hybrid.replica_seconds == pytest.approx(2 * 760e6 / 8 * 4 / 2 / 40e9)
    alone = _layouts(1)[1, 1, 1]
    assert alone.exposed_seconds == alone.update_seconds == 36 * 760e6 / 4e12
    slow = replace(LINKS, network_bytes=4e9)
    assert _layouts(16, links=slow)[1, 16, 1].shard_seconds == pytest.approx(
        6 * 760e6 * 15 / 16 / 32e9
    )


def test_latency_is_what_long_rings_cost():
    links = replace(LINKS, latency_seconds=5e-6)
    found, without = _layouts(1024, links=links), _layouts(1024)
    delay = found[1, 1024, 1].shard_seconds - without[1, 1024, 1].shard_seconds
    assert delay == pytest.approx(2 * 29 * 1023 * 5e-6)
    few = _layouts(1024, replace(WORK, blocks_per_unit=7), links)[1, 1024, 1]
    assert few.shard_seconds - without[1, 1024, 1].shard_seconds == pytest.approx(
        2 * 5 * 1023 * 5e-6
    )
    assert found[128, 8, 1].shard_seconds < 0.04 < found[1, 1024, 1].shard_seconds


def test_replicas_alone_share_nothing():
    found = _layouts(16, replace(WORK, zero=0))
    assert {shards for _, shards, _ in found} == {1}
    both = found[8, 1, 2]
    assert both.shard_seconds == 0
    assert both.replica_seconds == pytest.approx(2 * 4 * 760e6 * 15 / 16 / 200e9)


def test_two_gpus_take_what_two_were_measured_to_take():
    # docs/benchmarks/many-gpus_h200_2026-11-27: 574.7 ms with both, 568.3 for the slower alone,
    # 16 clips of 16x256 each; and 571.5 and 563.0 for 384 images.
    for parameters, alone_ms, both_ms in ((760e6, 568.3, 574.7), (675e6, 563.0, 571.5)):
        work = replace(WORK, parameters=int(parameters), blocks_per_unit=7)
        lone, both = _layouts(1, work)[1, 1, 1], _layouts(2, work)[1, 2, 1]
        found = 1000 * (both.exposed_seconds - lone.exposed_seconds)
        assert alone_ms + found == pytest.approx(both_ms, abs=4)


def test_sharding_within_a_machine_is_preferred_to_copies_that_all_update():
    best = best_layout(list(_layouts(64).values()), memory_bytes=70 * 2**30)
    assert best is not None
    assert (best.sp, best.dp_shard > 1) == (1, True)


def test_tokens_are_shared_only_where_memory_asks_for_it():
    found = list(_layouts(8).values())
    best = best_layout(found, memory_bytes=70 * 2**30)
    assert best is not None
    assert best.sp == 1
    least = min(found, key=lambda one: one.memory.total)
    assert best_layout(found, memory_bytes=least.memory.total - 1) is None
    # Where a clip fits only if two share it, two do.
    limit = min(one.memory.total for one in found if one.sp == 1) - 1
    best = best_layout(found, memory_bytes=limit)
    assert best is not None
    assert best.sp == 2


def test_what_is_computed_again_takes_its_time_and_sends_again():
    once = replace(WORK, forwards_again=lambda ring: 0, exchanges_again=0)
    again = replace(WORK, forwards_again=lambda ring: 2, exchanges_again=0.5)
    first, second = (_layouts(8, work)[1, 4, 2] for work in (once, again))
    assert second.compute_seconds == pytest.approx(5 / 3 * first.compute_seconds)
    assert second.exchange_seconds == pytest.approx(2.5 / 2 * first.exchange_seconds)


def test_beyond_the_heads_keys_go_around_rings():
    # 16 heads: two exchange heads, and three pass keys and values on.
    grid = TokenGrid(16, 256)
    work = replace(
        WORK, model="pixart", grid=grid, ring=lambda sp: {6: 3}.get(sp, 1), exchanges_again=0
    )
    found = _layouts(6, work)[1, 1, 6]
    tensor = -(-grid.total // 6) * 1152 * 2 * 28
    # Half of what two exchange leaves; around a ring all does, and in the backward twice.
    assert found.exchange_seconds == pytest.approx(
        (2 * 4 * tensor / 2 + 3 * 2 * 2 * tensor) / 200e9
    )


@pytest.mark.parametrize(
    ("checkpointing", "pieces", "forwards", "of_full_attention"),
    [
        ("none", "all", 0, 0),
        ("selective", "all", 0, 0),
        ("full", "all", 1, 1),
        ("nested", "all", 2, 2),
        ("nested", "pointwise", 1, 1),
    ],
)
def test_forwards_of_each_policy(checkpointing, pieces, forwards, of_full_attention):
    policy = checkpointing, pieces
    assert forwards_again(*policy) == forwards
    assert forwards_again(*policy, kept_share=0.25) == 0.75 * forwards
    assert exchanges_again("pixart", *policy) == of_full_attention
    assert exchanges_again("stdit", *policy) == min(1, forwards)  # its exchange is the block's
    # A quarter of a forward is attention that a branch keeps.
    spared = 0.25 if (checkpointing, pieces) == ("nested", "all") else 0
    assert forwards_again(*policy, attended_share=0.25) == forwards - spared


def test_attention_is_computed_again_where_keys_go_around_rings():
    work = replace(
        WORK, ring=lambda sp: {8: 2}.get(sp, 1), forwards_again=lambda ring: 2 if ring > 1 else 1.5
    )
    found = _layouts(8, work)
    # On eight GPUs, an eighth of a sample each or a quarter.
    assert found[1, 1, 8].compute_seconds / found[1, 2, 4].compute_seconds == pytest.approx(
        (1 + 2 / 3) / (1 + 1.5 / 3) / 2
    )
