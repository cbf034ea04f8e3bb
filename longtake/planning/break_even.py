"""When encoding ahead of time has paid for itself.

Encoding within the step costs the same in every step; encoding ahead costs once, and reading what
was kept costs a little in every step:

    steps = ahead / (within the step - reading)

All in seconds of a process. How many there are does not matter, as long as the same ones encode
ahead and train. A step that hides its encoders behind the transformer has less to save: what counts
is the time by which they make it longer.
"""

from __future__ import annotations

import math


def break_even_steps(
    *, ahead_seconds: float, saved_per_step: float, reading_per_step: float = 0.0
) -> float:
    """The steps after which encoding ahead wins; infinity if it never does.

    `saved_per_step` are the seconds by which a step is longer that encodes what is kept.

    Raises ValueError for negative times.
    """
    for name, seconds in (
        ("ahead_seconds", ahead_seconds),
        ("saved_per_step", saved_per_step),
        ("reading_per_step", reading_per_step),
    ):
        if not seconds >= 0:
            raise ValueError(f"{name}={seconds} must not be negative")
    gain = saved_per_step - reading_per_step
    if gain <= 0:
        return math.inf
    return ahead_seconds / gain
