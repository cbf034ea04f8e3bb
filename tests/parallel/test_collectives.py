from __future__ import annotations

import torch

from longtake.parallel import (
    PeerError,
    any_process,
    gather_json,
    mean_over_processes,
    run_together,
    start_distributed,
)
from tests.processes import run_in_processes


def _talk():
    import torch.distributed as dist

    start_distributed("cpu")
    rank = dist.get_rank()

    def fail_on_one():
        if rank == 1:
            raise OSError("the disk is full")
        return rank

    try:
        run_together(fail_on_one)
        error, cause = "", None
    except PeerError as caught:
        error, cause = str(caught), type(caught.__cause__).__name__
    return {
        "mean": mean_over_processes(torch.tensor([rank, 1.0])).tolist(),
        "any": (any_process(rank == 1), any_process(False)),
        "json": gather_json({"rank": rank, "text": "ü" * rank * 100}),
        "together": run_together(lambda: rank * 10),
        "error": error,
        "cause": cause,
    }


def test_processes_hear_one_another():
    first, second = run_in_processes(_talk, 2)
    for heard in (first, second):
        assert heard["mean"] == [0.5, 1.0]
        assert heard["any"] == (True, False)
        assert heard["json"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "ü" * 100}]
        assert heard["together"] == [0, 10]
        assert heard["error"] == "on rank 1: OSError: the disk is full"
    assert (first["cause"], second["cause"]) == ("NoneType", "OSError")


def test_alone_everything_works_without_a_group():
    assert mean_over_processes(torch.tensor(3.0)) == 3
    assert any_process(True)
    assert gather_json([1, "a"]) == [[1, "a"]]
    assert run_together(lambda: 5) == [5]
