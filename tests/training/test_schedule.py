from __future__ import annotations

import pytest

from longtake.training import ScheduleConfig, learning_rate


def rates(config: ScheduleConfig, total_steps: int = 10) -> list[float]:
    steps = range(total_steps)
    return [learning_rate(step, config, peak=2.0, total_steps=total_steps) for step in steps]


def test_warmup_rises_in_equal_parts_to_the_peak():
    assert rates(ScheduleConfig(warmup_steps=4))[:6] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_falls_in_equal_parts():
    found = rates(ScheduleConfig(warmup_steps=2, shape="linear", final_factor=0.2))
    assert found[2] == 2.0
    assert found[6] == pytest.approx(2.0 * (0.2 + 0.8 * 0.5))


def test_cosine_is_halfway_in_the_middle_and_stays_at_the_end():
    config = ScheduleConfig(shape="cosine", decay_steps=4, final_factor=0.1)
    found = rates(config)
    assert found[0] == 2.0
    assert found[2] == pytest.approx(2.0 * 0.55)
    assert found[4:] == pytest.approx([0.2] * 6)


def test_a_decay_with_no_steps_left_is_refused():
    config = ScheduleConfig(warmup_steps=10, shape="cosine")
    with pytest.raises(ValueError, match="ends at step 10 leaves nothing after warmup_steps=10"):
        learning_rate(10, config, peak=1.0, total_steps=10)
