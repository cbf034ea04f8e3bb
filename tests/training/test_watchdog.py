from __future__ import annotations

import os
import time

import pytest
import torch
from torch import nn

from longtake.parallel import start_distributed
from longtake.training import Watchdog, watchdog
from tests.processes import Processes, run_in_processes


def _hang(folder, timeouts):
    rank = int(os.environ["RANK"])
    with open(folder / f"stderr-{rank}", "w") as file:
        os.dup2(file.fileno(), 2)
    start_distributed("cpu")
    with Watchdog(timeouts[rank]) as watchdog:
        watchdog.progressed("the test")
        time.sleep(60)


def test_all_processes_say_where_they_stand_and_end_when_one_gives_up(tmp_path):
    with Processes(_hang, 2, tmp_path, (1, 50)) as processes:
        assert processes.exit_codes(30) == [1, 1]
    first, second = ((tmp_path / f"stderr-{rank}").read_text() for rank in (0, 1))
    for text in (first, second):
        assert "since the test began, and parallel.timeout_seconds=1: given up as hung" in text
        assert "in _hang" in text
    assert first.startswith("rank 0 (")
    assert "all processes are alive: the one that stands elsewhere than the rest" in first
    assert second.startswith("rank 1 (")
    assert "rank 0" in second.splitlines()[0]


def _go_on():
    start_distributed("cpu")
    model = nn.Linear(1, 1)
    with Watchdog(1) as watchdog:
        time.sleep(1.5)  # the clock has not been started
        watchdog.watch(model)
        for _ in range(4):
            model(torch.zeros(1))
            time.sleep(0.5)
    time.sleep(1.5)
    return True


def test_a_run_that_moves_is_left_alone():
    assert run_in_processes(_go_on, 1) == [True]


def _lose(message):
    start_distributed("cpu")
    with Watchdog(5):
        raise RuntimeError(message)


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [("Connection closed by peer [127.0.0.1]:1", True), ("mat1 and mat2 do not fit", False)],
)
def test_a_lost_connection_is_explained(message, is_lost, caplog, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match=message[:10]):
        _lose(message)
    assert ("has lost another process" in caplog.text) == is_lost


@pytest.mark.parametrize("world_size", [1, 1024, 100_000])
def test_signs_of_life_come_before_the_store_is_given_up(world_size):
    beat = watchdog._beat_seconds(world_size)
    assert beat >= 1
    assert watchdog._SILENT_BEATS * beat < watchdog._ASKING_SECONDS
