from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch.distributed as dist

from longtake.parallel.meeting import meet
from tests.processes import run_in_processes

TIMEOUT = timedelta(seconds=20)


def _attempts():
    rank = int(os.environ["RANK"])
    found = []
    for attempt in range(2):
        store = meet(rank, 2, TIMEOUT)
        if attempt == 0 or rank == 1:
            store.set(f"address/{rank}", f"attempt {attempt}")
        found.append(store.get("address/1").decode())
    return found, store.check(["address/0"])


def test_a_second_attempt_does_not_see_what_the_first_has_left():
    # In the second attempt the first process writes nothing, and its old address is not there.
    expected = (["attempt 0", "attempt 1"], False)
    assert run_in_processes(_attempts, 2) == [expected, expected]


def _alone():
    if os.environ["RANK"] == "1":
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        store.set("longtake/meeting/asks/1", "left by one that died")
        return None
    with pytest.raises(TimeoutError, match=r"1 of 2 processes did not come within 1 s.*rank 1"):
        meet(0, 2, timedelta(seconds=1))


def test_a_process_that_does_not_come_is_named():
    run_in_processes(_alone, 2)
