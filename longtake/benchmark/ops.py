"""Each operation alone: every implementation that runs here, its rate, and the bound under it."""

from __future__ import annotations

import fnmatch
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from longtake.benchmark.ceilings import seconds_of
from longtake.benchmark.measure import Say
from longtake.benchmark.operations import Operation, Prepared, Shapes, operations
from longtake.benchmark.records import FORMAT
from longtake.benchmark.render import number, wide
from longtake.ops.kernels import kernels_as
from longtake.planning import Ceilings
from longtake.randomness import named_seed

# Copies of all scores that an explicit softmax keeps for its backward, in fp32.
_SCORE_BYTES = 5 * 4
# A call longer than this is timed three times, not ten.
_LONG_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class OpTime:
    """One implementation of one operation. Times in milliseconds."""

    operation: str
    implementation: str
    is_automatic: bool
    """Whether training takes it of its own accord."""
    forward_ms: float | None = None
    both_ms: float | None = None
    """Forward and backward; None where there is no backward."""
    forward_rate: float | None = None
    both_rate: float | None = None
    rate_unit: str = "TFLOP/s"
    """Or GB/s, for what moves memory only."""
    floor_forward_ms: float = 0.0
    floor_both_ms: float | None = None
    """The larger of FLOPs over the rate of products and bytes over the rate of copies."""
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class OpsReport:
    """`longtake bench ops`."""

    environment: dict[str, Any]
    ceilings: Ceilings
    times: tuple[OpTime, ...]
    format: int = FORMAT


def measure_operations(
    shapes: Shapes,
    device: torch.device,
    ceilings: Ceilings,
    *,
    only: Sequence[str] = (),
    say: Say = lambda text: None,
) -> Iterator[OpTime]:
    """Times of all operations whose name fits one of the patterns, as they are measured.

    Raises: ValueError for a pattern that fits none.
    """
    chosen = list(operations(shapes))
    for pattern in only:
        if not any(fnmatch.fnmatch(operation.key, pattern) for operation in chosen):
            known = "; ".join(operation.key for operation in chosen)
            raise ValueError(f"--only {pattern} fits none of {known}")
    for operation in chosen:
        if only and not any(fnmatch.fnmatch(operation.key, pattern) for pattern in only):
            continue
        for implementation in operation.implementations:
            say(f"{operation.key}: {implementation}")
            yield _measure(operation, implementation, shapes, device, ceilings)


def _measure(
    operation: Operation,
    implementation: str,
    shapes: Shapes,
    device: torch.device,
    ceilings: Ceilings,
) -> OpTime:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found: tuple[float, float | None] | None = None
    try:
        if problem := _problem(operation, implementation, device):
            raise ValueError(problem)
        with kernels_as(operation.config(implementation)):
            found = _times(operation.prepare(_source(device, dtype), implementation), device)
        failure = None
    except Exception as error:  # Whatever a kernel dies of, the others are still to be measured.
        failure = " ".join(str(error).split())[:200] or type(error).__name__
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    floors = [
        max(flops / ceilings.linear_flops, moved / ceilings.copy_bytes)
        for flops, moved in zip(operation.flops, operation.moved, strict=True)
    ]
    # A product is bound by arithmetic, the rest by memory.
    has_flops = operation.flops[0] > 0
    amounts, unit = (operation.flops, 1e12) if has_flops else (operation.moved, 1e9)
    forward, both = found or (None, None)
    automatic = operation.automatic(shapes, dtype, device)
    return OpTime(
        operation=operation.key,
        implementation=implementation,
        is_automatic=implementation == automatic,
        forward_ms=forward and forward * 1000,
        both_ms=both and both * 1000,
        forward_rate=forward and amounts[0] / forward / unit,
        both_rate=both and sum(amounts) / both / unit,
        rate_unit="TFLOP/s" if has_flops else "GB/s",
        floor_forward_ms=floors[0] * 1000,
        floor_both_ms=sum(floors) * 1000 if floors[1] else None,
        failure=failure,
    )


def _problem(operation: Operation, implementation: str, device: torch.device) -> str | None:
    """Why it is not even tried."""
    if device.type != "cuda" and implementation in ("triton", "compiled", "cudnn", "fa4", "fp8"):
        return "needs a GPU"
    if implementation == "reference" and device.type == "cuda":
        needed = operation.scores * _SCORE_BYTES
        free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            return f"explicit scores need about {needed / 2**30:.0f} GiB"
    return None


def _source(device: torch.device, dtype: torch.dtype) -> Any:
    generator = torch.Generator(device)
    generator.manual_seed(named_seed(0, "benchmark/ops"))

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return draw


def _times(prepared: Prepared, device: torch.device) -> tuple[float, float | None]:
    """Seconds of forward, and of forward and backward."""

    def forward() -> Any:
        with torch.no_grad():
            return prepared.forward()

    out = _last(forward())
    first = seconds_of(forward, device, repeats=1, warmup=1)
    counts = {"repeats": 3, "warmup": 1} if first > _LONG_SECONDS else {}
    forward_seconds = seconds_of(forward, device, **counts)
    if not prepared.inputs:
        return forward_seconds, None
    gradient = torch.randn_like(out)
    del out

    def both() -> None:
        torch.autograd.grad(_last(prepared.forward()), prepared.inputs, gradient)

    return forward_seconds, seconds_of(both, device, **counts)


def _last(out: Any) -> Tensor:
    return out[-1] if isinstance(out, tuple) else out


def show_operations(times: Sequence[OpTime], console: Console) -> None:
    """A row per implementation; "*" marks what training takes of its own accord."""
    table = Table(title="Operations alone", title_justify="left")
    columns = ("operation", "by", "forward ms", "both ms", "forward", "both", "", "floor ms")
    for place, heading in enumerate(columns):
        table.add_column(heading, justify="left" if place in (0, 1, 6) else "right")
    before = ""
    for time in times:
        name = time.operation if time.operation != before else ""
        before = time.operation
        mark = " *" if time.is_automatic else ""
        if time.failure is not None:
            table.add_row(name, f"{time.implementation}{mark}", escape(f"[{time.failure}]"))
            continue
        floors = [number(time.floor_forward_ms, 3)]
        if time.both_ms is not None:
            floors.append(number(time.floor_both_ms, 3))
        table.add_row(
            name,
            f"{time.implementation}{mark}",
            number(time.forward_ms),
            number(time.both_ms),
            number(time.forward_rate, 3),
            number(time.both_rate, 3),
            time.rate_unit,
            " / ".join(floors),
        )
    wide(console).print(table)
