"""The few conversations between processes outside the model; the one place that knows how they are
spelled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class PeerError(RuntimeError):
    """Something failed on one or more processes; raised with the same text on all of them."""


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes, a new tensor on the same device; the host does not
    wait."""
    result = tensor.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(result, op=dist.ReduceOp.AVG)
    return result


def any_process(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether the flag is set on any process; goes over gloo, so the host waits but no GPU does."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return flag
    value = torch.tensor(int(flag), dtype=torch.int32)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value)


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every process's JSON-able value, in rank order, on all processes. JSON, so that nothing is
    unpickled."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [json.loads(json.dumps(value))]
    world_size = dist.get_world_size(group)
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(lengths, torch.tensor([payload.numel()]), group=group)
    longest = int(max(lengths))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: payload.numel()] = payload
    received = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world_size)]
    dist.all_gather(received, padded, group=group)
    return [
        json.loads(bytes(data[: int(length)].tolist()))
        for data, length in zip(received, lengths, strict=True)
    ]


def run_together(function: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """Runs a local function on every process; returns all results, or fails on all processes alike.

    Results are JSON-able and come in rank order. No process goes on while another one has failed.

    Raises: PeerError that names each failed rank with its error; on the failed process itself, it
    has the original error as its cause.
    """
    result, error = None, None
    try:
        result = function()
    except Exception as caught:
        error = caught
    text = None if error is None else f"{type(error).__name__}: {error}"
    outcomes = gather_json({"result": result, "error": text}, group)
    failed = {rank: one["error"] for rank, one in enumerate(outcomes) if one["error"] is not None}
    if failed:
        texts = sorted(set(failed.values()))
        ranks = ", ".join(map(str, failed))
        where = "" if len(outcomes) == 1 else f"on rank {ranks}: "
        raise PeerError(where + "; ".join(texts)) from error
    return [one["result"] for one in outcomes]
