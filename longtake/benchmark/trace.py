"""From a profiler's trace to where a step's time went.

A kernel belongs to the part of the step that launched it: whichever thread did so, the launch lies
within that part's span of time, since the main thread waits for the others (backward runs on
autograd's). Parts do not add up twice: while several kernels run at once, training counts before
encoding, which runs beside it on a stream of its own, and communication only while nothing else
runs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longtake.pipeline.inputs import ENCODE
from longtake.pipeline.step import BACKWARD, FORWARD, OPTIMIZER

# A whole step, as the profile marks it.
STEP = "longtake.bench.step"

PARTS = ("data", "encode", "forward", "backward", "optimizer", "other", "communication", "idle")
# Whose the time is while several run: what is hidden behind the transformer costs nothing.
_ORDER = ("forward", "backward", "optimizer", "encode", "data", "other", "communication")
_SPANS = {ENCODE: "encode", FORWARD: "forward", BACKWARD: "backward", OPTIMIZER: "optimizer"}

_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class KernelCost:
    """One kernel (on a CPU: one operation), all its launches in a step together."""

    name: str
    ms: float
    share: float
    """Of the step's time."""
    count: float


@dataclass(frozen=True, kw_only=True)
class Split:
    """A step's time, in milliseconds a step."""

    step_ms: float
    parts_ms: dict[str, float]
    communication_ms: float
    """All of it, also what runs beside computation."""
    encode_ms: float
    """All of it, also what runs beside training."""
    launches: float
    """Kernels a step; on a CPU operations."""
    copies: float
    """Copies and fills by the device's copy engines."""
    costliest: tuple[KernelCost, ...]


def split_step(events: Sequence[Event], *, top: int = 100) -> Split:
    """The mean of the marked steps but the first, which only brings the device up to pace.

    Times in the trace are in microseconds.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    steps = sorted((e for e in complete if _is_span(e, STEP)), key=lambda e: e["ts"])
    assert len(steps) >= 2, "a trace needs at least two marked steps"
    if any(event.get("cat") == "kernel" for event in complete):
        return _split_device(complete, steps, top)
    return _split_host(complete, steps, top)


def _split_device(events: list[Event], steps: list[Event], top: int) -> Split:
    spans = _Spans(events)
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    start_of_second = steps[1]["ts"]
    window_start, window_end = 0.0, 0.0
    work: list[tuple[float, float, str]] = []
    costs: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    copies = 0
    for event in events:
        if event.get("cat") not in _ON_DEVICE:
            continue
        launch = launched.get(event.get("args", {}).get("correlation"), event["ts"])
        start, end = event["ts"], event["ts"] + event["dur"]
        if launch < start_of_second:
            window_start = max(window_start, end)
            continue
        window_end = max(window_end, end)
        work.append((start, end, _part(event, spans.at(launch))))
        copies += event["cat"] != "kernel"
        if event["cat"] == "kernel":
            costs[event["name"]] += event["dur"]
            counts[event["name"]] += 1
    count = len(steps) - 1
    total = window_end - window_start
    parts = _exclusive(work, window_start)
    parts["idle"] = total - sum(parts.values())

    def alone(wanted: str) -> float:
        """What a part takes without regard to the others."""
        own = [(start, end, part) for start, end, part in work if part == wanted]
        return _exclusive(own, window_start).get(wanted, 0.0) / count / 1000

    return Split(
        step_ms=total / count / 1000,
        parts_ms={part: parts.get(part, 0.0) / count / 1000 for part in PARTS},
        communication_ms=alone("communication"),
        encode_ms=alone("encode"),
        launches=sum(counts.values()) / count,
        copies=copies / count,
        costliest=_costliest(costs, counts, count, total, top),
    )


def _split_host(events: list[Event], steps: list[Event], top: int) -> Split:
    """Without a device the spans themselves are the parts, and operations the kernels."""
    start = steps[1]["ts"]
    end = steps[-1]["ts"] + steps[-1]["dur"]
    inside = [event for event in events if start <= event["ts"] < end]
    parts: dict[str, float] = defaultdict(float)
    for event in inside:
        if part := _SPANS.get(event["name"]) if _is_span(event, event["name"]) else None:
            parts[part] += event["dur"]
    parts["other"] = end - start - sum(parts.values())
    costs, counts = _self_times(event for event in inside if event.get("cat") == "cpu_op")
    count = len(steps) - 1
    return Split(
        step_ms=(end - start) / count / 1000,
        parts_ms={part: parts.get(part, 0.0) / count / 1000 for part in PARTS},
        communication_ms=0.0,
        encode_ms=parts.get("encode", 0.0) / count / 1000,
        launches=sum(counts.values()) / count,
        copies=0.0,
        costliest=_costliest(costs, counts, count, end - start, top),
    )


def _is_span(event: Event, name: str) -> bool:
    return event.get("cat") == "user_annotation" and event["name"] == name


class _Spans:
    """Which part of the step the host was in, by time."""

    def __init__(self, events: Iterable[Event]) -> None:
        found = sorted(
            (event["ts"], event["ts"] + event["dur"], _SPANS[event["name"]])
            for event in events
            if event.get("cat") == "user_annotation" and event["name"] in _SPANS
        )
        self._starts = [start for start, _, _ in found]
        self._spans = found

    def at(self, moment: float) -> str:
        place = bisect_right(self._starts, moment) - 1
        if place >= 0 and moment <= self._spans[place][1]:
            return self._spans[place][2]
        return "other"


def _part(event: Event, launched_in: str) -> str:
    if "nccl" in event["name"].lower():
        return "communication"
    # A step's inputs come from the host, and nothing else does in quantity.
    if event["cat"] == "gpu_memcpy" and "HtoD" in event["name"] and launched_in in _BEFORE_FORWARD:
        return "data"
    return launched_in


_BEFORE_FORWARD = ("encode", "other")


def _exclusive(work: list[tuple[float, float, str]], window_start: float) -> dict[str, float]:
    """Time by part, each moment counted once."""
    edges = []
    for start, end, part in work:
        if end > window_start:
            edges += [(max(start, window_start), 1, part), (end, -1, part)]
    edges.sort(key=lambda edge: edge[0])
    running: Counter[str] = Counter()
    found: dict[str, float] = defaultdict(float)
    before = window_start
    for moment, change, part in edges:
        active = next((part for part in _ORDER if running[part] > 0), None)
        if active is not None:
            found[active] += moment - before
        before = moment
        running[part] += change
    return found


def _self_times(operations: Iterable[Event]) -> tuple[dict[str, float], Counter[str]]:
    """Time in each operation but not in those that it calls, and how often it was called."""
    costs: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    open_by_thread: dict[Any, list[tuple[float, str]]] = defaultdict(list)
    for event in sorted(operations, key=lambda e: (e["ts"], -e["dur"])):
        callers = open_by_thread[event.get("tid")]
        while callers and callers[-1][0] <= event["ts"]:
            callers.pop()
        if callers:
            costs[callers[-1][1]] -= event["dur"]
        costs[event["name"]] += event["dur"]
        counts[event["name"]] += 1
        callers.append((event["ts"] + event["dur"], event["name"]))
    return costs, counts


def _costliest(
    costs: dict[str, float], counts: Counter[str], steps: int, total: float, top: int
) -> tuple[KernelCost, ...]:
    order = sorted(costs, key=lambda name: -costs[name])[:top]
    return tuple(
        KernelCost(
            name=name,
            ms=costs[name] / steps / 1000,
            share=costs[name] / total,
            count=counts[name] / steps,
        )
        for name in order
    )
