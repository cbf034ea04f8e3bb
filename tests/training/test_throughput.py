from __future__ import annotations

import pytest

from longtake.training import ThroughputMeter


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_rates_come_from_training_time_alone():
    clock = Clock()
    meter = ThroughputMeter(total_steps=100, num_devices=2, peak_flops_per_second=1e3, clock=clock)
    for _ in range(4):
        clock.seconds += 0.5
        meter.add(samples=8, tokens=800, flops=500.0)
    with meter.paused():
        clock.seconds += 60
    found = meter.report(10)
    assert found.step_seconds == 0.5
    assert found.samples_per_second == 16
    assert found.tokens_per_second == 1600
    assert found.tokens_per_second_per_device == 800
    assert found.seconds_left == 45
    assert found.mfu == pytest.approx(2000 / 2 / (1e3 * 2))


def test_a_report_begins_the_next_interval():
    clock = Clock()
    meter = ThroughputMeter(total_steps=3, num_devices=1, clock=clock)
    for steps_done in (1, 2, 3):
        clock.seconds += steps_done
        meter.add(samples=1, tokens=6)
        found = meter.report(steps_done)
        assert found.tokens_per_second == 6 / steps_done
        assert found.mfu is None
    assert found.seconds_left == 0
