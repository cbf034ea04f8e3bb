"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then one of three shapes."""

    warmup_steps: int = 0
    shape: Literal["constant", "cosine", "linear"] = "constant"
    decay_steps: int | None = None
    """Step at which "cosine" and "linear" reach the final factor; None: the last step of the run.
    """
    final_factor: float = 0.0
    """What remains of the peak learning rate at the end of the decay."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps={self.warmup_steps} must be at least 0")
        if not 0 <= self.final_factor <= 1:
            raise ValueError(f"schedule.final_factor={self.final_factor} must be in [0, 1]")


def learning_rate(step: int, config: ScheduleConfig, *, peak: float, total_steps: int) -> float:
    """The learning rate of update number `step`, counted from 0.

    Warm-up: update i < warmup_steps uses peak * (i + 1) / warmup_steps, so that none is wasted at
    zero.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.shape == "constant":
        return peak
    end = config.decay_steps if config.decay_steps is not None else total_steps
    if end <= config.warmup_steps:
        raise ValueError(
            f"a {config.shape} decay that ends at step {end} leaves nothing after "
            f"warmup_steps={config.warmup_steps}: make the run longer or the warm-up shorter"
        )
    progress = min(1.0, (step - config.warmup_steps) / (end - config.warmup_steps))
    remaining = 1 - progress if config.shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (config.final_factor + (1 - config.final_factor) * remaining)
