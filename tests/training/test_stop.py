from __future__ import annotations

import os
import signal
import time

from longtake.training import StopRequest
from tests.processes import Processes, run_in_processes


def _first_and_second():
    stop = StopRequest()
    assert not stop.agreed()
    signal.raise_signal(signal.SIGUSR1)
    assert stop.agreed()
    # What a terminal and torchrun send together is one request.
    signal.raise_signal(signal.SIGTERM)
    return stop.signal_name


def test_signals_close_together_are_one_request():
    assert run_in_processes(_first_and_second, 1) == ["SIGUSR1"]


def _insist(folder):
    stop = StopRequest()
    signal.raise_signal(signal.SIGTERM)
    stop._time -= 10
    (folder / "asked").touch()
    time.sleep(60)


def test_a_second_request_ends_at_once(tmp_path):
    with Processes(_insist, 1, tmp_path) as processes:
        processes.wait_until((tmp_path / "asked").exists)
        processes.signal(0, signal.SIGTERM)
        assert processes.exit_codes(10) == [-signal.SIGTERM]


def _fork_a_worker():
    stop = StopRequest()
    worker = os.fork()
    if worker == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(worker, signal.SIGINT)
    time.sleep(0.2)
    still_there = os.waitpid(worker, os.WNOHANG) == (0, 0)
    os.kill(worker, signal.SIGTERM)
    _, status = os.waitpid(worker, 0)
    return still_there, os.WTERMSIG(status), stop.signal_name


def test_a_forked_worker_can_still_be_ended():
    assert run_in_processes(_fork_a_worker, 1) == [(True, signal.SIGTERM, None)]
