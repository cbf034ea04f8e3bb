from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from longtake.parallel import (
    COLLECTIVE_MARGIN_SECONDS,
    ParallelConfig,
    build_mesh,
    start_distributed,
    stop_distributed,
)
from longtake.parallel.mesh import (
    attention_degrees,
    compute_dtype,
    divide_group,
    resolve_degrees,
)
from tests.processes import run_in_processes


@pytest.mark.parametrize(
    ("config", "world_size", "expected"),
    [
        (ParallelConfig(), 1, (1, 1)),
        (ParallelConfig(), 6, (1, 6)),
        (ParallelConfig(dp_replicate=2), 8, (2, 4)),
        (ParallelConfig(dp_replicate=4, dp_shard=1), 4, (4, 1)),
        (ParallelConfig(sp=2), 8, (1, 4)),
        (ParallelConfig(sp=4, dp_replicate=2, dp_shard=1), 8, (2, 1)),
    ],
)
def test_degrees_fill_the_processes(config, world_size, expected):
    assert resolve_degrees(config, world_size) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ParallelConfig(dp_replicate=3, dp_shard=2),
            r"dp_replicate=3 × dp_shard=2 must equal the 8",
        ),
        (ParallelConfig(dp_replicate=3), r"dp_replicate=3 must divide .* 1, 2, 4, 8"),
        (ParallelConfig(dp_replicate=0), r"dp_replicate=0 must be at least 1"),
        (ParallelConfig(dp_shard=-2), r"dp_shard=-2 must be at least 1, or -1"),
        (ParallelConfig(sp=0), r"sp=0 must be at least 1"),
        (ParallelConfig(sp=3), r"sp=3 must divide the 8 processes: use one of 1, 2, 4, 8, or"),
        (
            ParallelConfig(sp=2, dp_replicate=3),
            r"dp_replicate=3 must divide the 8 processes / sp=2: use one of 1, 2, 4",
        ),
        (
            ParallelConfig(sp=2, dp_shard=8),
            r"dp_shard=8 must equal the 8 processes / sp=2: .* or start 16 processes",
        ),
    ],
)
def test_degrees_that_do_not_fit_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        resolve_degrees(config, 8)


def test_cuda_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="PyTorch sees no CUDA device"):
        start_distributed("cuda")


def test_compute_dtype_follows_the_device():
    assert compute_dtype(ParallelConfig(), torch.device("cpu")) == torch.float32
    assert compute_dtype(ParallelConfig(), torch.device("cuda")) == torch.bfloat16
    assert compute_dtype(ParallelConfig(param_dtype="fp32"), torch.device("cuda")) == torch.float32


def _places():
    mesh = build_mesh(ParallelConfig(sp=2, dp_replicate=2), start_distributed("cpu"))
    ranks = dist.get_process_group_ranks(_resolve_process_group(mesh.token_group.name))
    return mesh.dp_rank, mesh.token_group.rank, ranks, mesh.fsdp_mesh.mesh.tolist()


def test_a_token_group_is_of_neighbours_and_sees_the_same_samples():
    weights = [[0, 1], [2, 3]]
    assert run_in_processes(_places, 4) == [
        (0, 0, [0, 1], weights),
        (0, 1, [0, 1], weights),
        (1, 0, [2, 3], weights),
        (1, 1, [2, 3], weights),
    ]


@pytest.mark.parametrize(
    ("sp", "num_heads", "degrees"),
    [(1, 16, (1, 1)), (8, 16, (8, 1)), (32, 16, (16, 2)), (3, 16, (1, 3)), (6, 4, (2, 3))],
)
def test_attention_goes_by_heads_as_far_as_they_divide(sp, num_heads, degrees):
    assert attention_degrees(sp, num_heads) == degrees


def _divided(sp, num_heads):
    mesh = build_mesh(ParallelConfig(sp=sp), start_distributed("cpu"))
    return [
        group and (group.rank, dist.get_process_group_ranks(_resolve_process_group(group.name)))
        for group in divide_group(mesh.token_group, num_heads)
    ]


def test_a_token_group_is_divided_into_neighbours_and_rings():
    found = run_in_processes(_divided, 8, 4, 2, timeout_seconds=120)
    for first in (0, 4):
        assert found[first : first + 4] == [
            [(0, [first, first + 1]), (0, [first, first + 2])],
            [(1, [first, first + 1]), (0, [first + 1, first + 3])],
            [(0, [first + 2, first + 3]), (1, [first, first + 2])],
            [(1, [first + 2, first + 3]), (1, [first + 1, first + 3])],
        ]
    assert run_in_processes(_divided, 2, 2, 4)[1] == [(1, [0, 1]), None]
    assert run_in_processes(_divided, 2, 2, 1)[1] == [None, (1, [0, 1])]


def _timeouts():
    config = ParallelConfig(sp=2, dp_replicate=2, timeout_seconds=4321)
    mesh = build_mesh(config, start_distributed("cpu", timeout_seconds=4321))
    groups = [
        *mesh.device_mesh.get_all_groups(),
        *mesh.with_own_groups().device_mesh.get_all_groups(),
        _resolve_process_group(mesh.token_group.name),
    ]
    cpu = torch.device("cpu")
    return [group._get_backend(cpu).options._timeout.total_seconds() for group in groups]


def test_every_group_waits_as_long_as_is_said():
    for timeouts in run_in_processes(_timeouts, 4):
        assert timeouts == [4321 + COLLECTIVE_MARGIN_SECONDS] * 5


def _lonely():
    import os

    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    mesh = build_mesh(ParallelConfig(), start_distributed("cpu"))
    stop_distributed()
    stop_distributed()
    return mesh.world_size, mesh.dp_rank, mesh.dp_size, mesh.is_first


def test_one_process_needs_no_launcher():
    assert run_in_processes(_lonely, 1) == [(1, 0, 1, True)]


def _groups(dp_replicate):
    mesh = build_mesh(ParallelConfig(dp_replicate=dp_replicate), start_distributed("cpu"))
    own = mesh.with_own_groups()
    names = [
        one.device_mesh.get_group(axis).group_name
        for one in (mesh, own)
        for axis in ("dp_replicate", "dp_shard_sp")
    ]
    total = torch.tensor([float(mesh.rank)])
    torch.distributed.all_reduce(total, group=own.device_mesh.get_group("dp_shard_sp"))
    same = own.fsdp_mesh.mesh.tolist() == mesh.fsdp_mesh.mesh.tolist()
    return len(set(names)), same, total.item()


def test_a_grid_with_groups_of_its_own_has_the_same_processes():
    assert run_in_processes(_groups, 4, 2) == [(4, True, 1.0)] * 2 + [(4, True, 5.0)] * 2
    assert [found[:2] for found in run_in_processes(_groups, 2, 1)] == [(4, True)] * 2
