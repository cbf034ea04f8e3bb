"""Claims exclude other processes, and end with their holder however that ends."""

import os
import signal
import time

from longtake.store.claims import take_claim, wait_for_claim
from tests.processes import Processes, run_in_processes


def _hold(store, name, for_ever):
    claim = take_claim(store, name)
    assert claim is not None
    (store / "held").touch()
    while for_ever:
        time.sleep(1)
    claim.release()


def _try(store, name):
    claim = take_claim(store, name)
    if claim is not None:
        claim.release()
    return claim is not None


def test_a_claim_excludes_others_until_its_holder_is_killed(tmp_path):
    with Processes(_hold, 1, tmp_path, "one", True) as holder:
        holder.wait_until((tmp_path / "held").exists)
        assert take_claim(tmp_path, "one") is None
        other = take_claim(tmp_path, "two")
        assert other is not None
        other.release()
        holder.signal(0, signal.SIGKILL)
        holder.exit_codes()
    claim = take_claim(tmp_path, "one")
    assert claim is not None
    assert run_in_processes(_try, 1, tmp_path, "one") == [False]
    claim.release()
    assert run_in_processes(_try, 1, tmp_path, "one") == [True]
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_child_that_outlives_the_holder_does_not_keep_the_claim(tmp_path):
    claim = take_claim(tmp_path, "one")
    assert claim is not None
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        claim.release()
        assert run_in_processes(_try, 1, tmp_path, "one") == [True]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _count(store, times):
    """Adds to a number that only the claim protects."""
    for _ in range(times):
        with wait_for_claim(store, "number"):
            number = int((store / "number").read_text())
            time.sleep(0.001)
            (store / "number").write_text(str(number + 1))


def test_waiting_for_a_claim_takes_turns(tmp_path, monkeypatch):
    (tmp_path / "number").write_text("0")
    run_in_processes(_count, 3, tmp_path, 5)
    assert (tmp_path / "number").read_text() == "15"
