import torch

from longtake.benchmark import protocol as room
from longtake.benchmark.protocol import quick, time_steps
from longtake.benchmark.records import Protocol

CPU = torch.device("cpu")


class _Steps:
    """A clock that steps move on by themselves."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.count, self.seconds = 0.0, 0, seconds
        monkeypatch.setattr(room.time, "perf_counter", lambda: self.now)

    def __call__(self):
        self.now += self.seconds[min(self.count, len(self.seconds) - 1)]
        self.count += 1


def test_warmup_is_not_timed(monkeypatch):
    steps = _Steps(monkeypatch, [9.0, 1.0, 0.1])
    found, clocks = time_steps(steps, CPU, Protocol(warmup=5, steps=10))
    assert steps.count == 15
    assert clocks is None
    assert found.warmup_steps == 5
    assert found.first_step_seconds == 9.0
    assert len(found.step_ms) == 10
    assert abs(found.median_ms - 100) < 1e-6
    assert found.max_ms < 101


def test_median_range_and_quartiles(monkeypatch):
    steps = _Steps(monkeypatch, [0.001, 0.001, 0.002, 0.003, 0.005, 0.014])
    found, _ = time_steps(steps, CPU, Protocol(warmup=1, steps=5))
    assert [round(time) for time in found.step_ms] == [1, 2, 3, 5, 14]
    assert round(found.median_ms) == 3
    assert (round(found.min_ms), round(found.max_ms)) == (1, 14)
    assert tuple(map(round, found.quartiles_ms)) == (2, 5)


def test_long_steps_are_timed_fewer_times(monkeypatch):
    steps = _Steps(monkeypatch, [6.0])
    found, _ = time_steps(steps, CPU, Protocol(warmup=5, steps=10, seconds=20))
    assert (found.warmup_steps, len(found.step_ms)) == (2, 3)
    steps = _Steps(monkeypatch, [4.0])
    assert len(time_steps(steps, CPU, Protocol(steps=10, seconds=20))[0].step_ms) == 5


def test_workloads_that_take_turns_are_timed_equally_often(monkeypatch):
    steps = _Steps(monkeypatch, [0.1, 0.3] * 20)
    found, _ = time_steps(steps, CPU, Protocol(warmup=2, steps=3), turns=2)
    assert [round(time) for time in found.step_ms] == [100, 300, 100, 300]
    # Also where long steps are timed fewer times.
    steps = _Steps(monkeypatch, [6.0])
    found, _ = time_steps(steps, CPU, Protocol(steps=10, seconds=20), turns=4)
    assert len(found.step_ms) == 4


def test_long_warmup_steps_are_told_at_once(monkeypatch):
    steps, told = _Steps(monkeypatch, [30.0, 12.0, 9.0, 1.0, 1.0]), []
    time_steps(steps, CPU, Protocol(warmup=3, steps=2, seconds=1000), told.append)
    assert told == ["warm-up step 1 took 30.0 s", "warm-up step 2 took 12.0 s"]


def test_warmup_goes_on_while_anything_is_compiled(monkeypatch):
    steps = _Steps(monkeypatch, [0.1])
    monkeypatch.setattr(room, "count_graphs", lambda: min(steps.count, 7))
    found, _ = time_steps(steps, CPU, Protocol(warmup=2, steps=3))
    # The seventh step compiled the last graph; the eighth compiled none.
    assert found.warmup_steps == 8


def test_warmup_ends_even_if_every_step_compiles(monkeypatch):
    steps = _Steps(monkeypatch, [0.1])
    monkeypatch.setattr(room, "count_graphs", lambda: steps.count)
    assert time_steps(steps, CPU, Protocol(warmup=2, steps=3))[0].warmup_steps == 30


def test_search_steps_are_few():
    short = quick(Protocol())
    assert (short.warmup, short.steps) == (2, 3)
    assert quick(Protocol(warmup=1, steps=1)).steps == 1
