"""The timing of steps: warm-up, then CUDA events between steps that nothing waits for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch

from longtake.benchmark.graphs import count_graphs
from longtake.benchmark.machine import clocks_now
from longtake.benchmark.records import Protocol, Timing, timing
from longtake.parallel import gather_json

# Where a whole protocol would take too long.
_LEAST_WARMUP, _LEAST_STEPS = 2, 3
# Whoever waits longer for a step wants to hear of it, and needs no more of them than must be.
_LONG_SECONDS = 10.0
# Compilation that does not come to an end by then never will.
_MOST_WARMUP = 30
_QUICK = replace(Protocol(), warmup=2, steps=3, seconds=6.0)


def describe_protocol(protocol: Protocol) -> str:
    """The protocol in a sentence."""
    return (
        f"{protocol.warmup} warm-up steps (more while anything is being compiled), "
        f"{protocol.steps} timed, CUDA events between steps (the wall clock on a CPU), median; "
        f"where that would take more than {protocol.seconds:g} s, fewer, at least "
        f"{_LEAST_WARMUP} and {_LEAST_STEPS}"
    )


def quick(protocol: Protocol) -> Protocol:
    """The protocol of a search: enough to rank micro-batches."""
    return replace(
        _QUICK,
        warmup=min(_QUICK.warmup, protocol.warmup),
        steps=min(_QUICK.steps, protocol.steps),
        seconds=min(_QUICK.seconds, protocol.seconds),
        seed=protocol.seed,
    )


def time_steps(
    step: Callable[[], object],
    device: torch.device,
    protocol: Protocol,
    say: Callable[[str], None] = lambda text: None,
    *,
    turns: int = 1,
) -> tuple[Timing, str | None]:
    """Times steps; also the GPU's clocks while the last of them ran. Long ones are told at once.

    Of workloads that take turns each is timed equally often: steps come in whole rounds.
    """
    seconds, number, first = 0.0, 0, 0.0
    graphs = -1
    while number < _MOST_WARMUP:
        enough = protocol.warmup
        if seconds * protocol.warmup > protocol.seconds / 2:
            enough = min(_LEAST_WARMUP, protocol.warmup)
        if _agreed(number >= enough and graphs == count_graphs()):
            break
        graphs = count_graphs()
        seconds = _wall_clock(step, device)
        number += 1
        first = first or seconds
        if seconds > _LONG_SECONDS:
            say(f"warm-up step {number} took {seconds:.1f} s")
    steps = protocol.steps
    if seconds * steps > protocol.seconds:
        steps = max(min(_LEAST_STEPS, steps), int(protocol.seconds / max(seconds, 1e-9)))
    steps = _agreed(-(-steps // turns) * turns)
    if device.type == "cuda":
        is_long = seconds > _LONG_SECONDS
        step_ms, clocks = _event_times(step, steps, warm_up=not is_long)
        number += not is_long
    else:
        step_ms, clocks = [_wall_clock(step, device) * 1000 for _ in range(steps)], None
    return timing(step_ms, warmup_steps=number, first_step_seconds=first), clocks


def _wall_clock(step: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _event_times(
    step: Callable[[], object], steps: int, *, warm_up: bool
) -> tuple[list[float], str | None]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    # One more step of warm-up, not waited for: the first timed one must not include the host's way
    # to its first kernel, which the device later never waits for. Of a long step it is nothing.
    if warm_up:
        step()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    clocks = clocks_now(torch.device("cuda", torch.cuda.current_device()))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)], clocks


def _agreed(value: int) -> int:
    """The first process's decision: all must make the same steps."""
    return gather_json(value)[0]
