import math

import pytest

from longtake.planning import break_even_steps


def test_encoding_ahead_pays_when_its_seconds_are_saved():
    # 10,000 clips of 11.5 ms each, once; 32 of them a step: an epoch and its 312.5 steps.
    steps = break_even_steps(ahead_seconds=115.0, saved_per_step=32 * 0.0115)
    assert steps == pytest.approx(312.5)
    # Twice that if encoding ahead waits for the decoder half of the time, or if half of what a step
    # spends is hidden behind the transformer, or if reading costs half of encoding.
    assert break_even_steps(ahead_seconds=230.0, saved_per_step=0.368) == pytest.approx(625)
    assert break_even_steps(ahead_seconds=115.0, saved_per_step=0.184) == pytest.approx(625)
    slow = break_even_steps(ahead_seconds=115.0, saved_per_step=0.368, reading_per_step=0.184)
    assert slow == pytest.approx(625)


def test_what_saves_nothing_never_wins():
    assert break_even_steps(ahead_seconds=1.0, saved_per_step=0.0) == math.inf
    assert break_even_steps(ahead_seconds=1.0, saved_per_step=0.1, reading_per_step=0.2) == math.inf
    assert break_even_steps(ahead_seconds=0.0, saved_per_step=0.1) == 0


def test_negative_times_are_refused():
    with pytest.raises(ValueError, match=r"saved_per_step=-1\.0 must not be negative"):
        break_even_steps(ahead_seconds=1.0, saved_per_step=-1.0)
