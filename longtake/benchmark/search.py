"""The micro-batch at which a step makes the most samples per second: tried, not guessed."""

from __future__ import annotations

from collections.abc import Callable

from longtake.benchmark.records import Trial

# Going on is worth it from here.
_GAIN = 1.01
# Below so many tokens no GPU worth timing is busy: nothing is tried there, unless it must be.
_FIRST_TOKENS = 32_768
# What fragments and libraries take beside the tensors, as a share of the memory.
_SPARE = 0.04


class DoesNotFit(RuntimeError):
    """The memory of this device cannot hold a step of this configuration."""


def first_micro_batch(tokens_per_sample: int) -> int:
    """Where the search begins: a power of two."""
    count = 1
    while count * tokens_per_sample < _FIRST_TOKENS:
        count *= 2
    return count


def best_micro_batch(
    attempt: Callable[[int], Trial],
    *,
    start: int,
    may_fit: Callable[[int, list[Trial]], bool] = lambda micro_batch, trials: True,
) -> tuple[int, list[Trial]]:
    """The best micro-batch and everything that was tried.

    From `start` down by halves until one fits, then up by doubling while that pays at least 1 %
    and memory allows it; where memory stopped it, the first that fits of a half, a quarter and an
    eighth more.

    Raises: DoesNotFit if not even a micro-batch of 1 fits.
    """
    trials: list[Trial] = []

    def rate(micro_batch: int) -> float:
        """Samples per second; 0 if it does not fit."""
        if not may_fit(micro_batch, trials):
            return 0.0
        trials.append(attempt(micro_batch))
        return trials[-1].samples_per_second or 0.0

    best = start
    while not (speed := rate(best)):
        if best == 1:
            raise DoesNotFit("a micro-batch of 1 does not fit into memory")
        best //= 2
    if best < start:
        # The doubled one did not fit.
        ended_by_memory = True
    else:
        while (next_speed := rate(2 * best)) >= _GAIN * speed:
            best, speed = 2 * best, next_speed
        ended_by_memory = next_speed == 0
    if ended_by_memory:
        for parts in (2, 4, 8):
            more = best + best // parts
            if best % parts == 0 and (next_speed := rate(more)):
                return (more if next_speed > speed else best), trials
    return best, trials


def memory_allows(
    micro_batch: int, trials: list[Trial], *, fixed_gib: float, limit_gib: float
) -> bool:
    """Whether memory should suffice, by the straight line through what is needed anyway and the
    last trial; before the first trial anything may fit."""
    peaks = [(t.micro_batch, t.peak_gib) for t in trials if t.peak_gib is not None]
    if not peaks:
        return True
    tried, peak_gib = peaks[-1]
    predicted = fixed_gib + (peak_gib - fixed_gib) * micro_batch / tried
    return predicted <= limit_gib * (1 - _SPARE)
