"""What a benchmark found, as it is saved: JSON that another run can be compared with."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from longtake.config import from_plain
from longtake.planning import Ceilings

Encoders = Literal["absent", "on-line", "cached"]

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How steps are timed; the same for every row."""

    warmup: int = 5
    """Steps before the timed ones; more while anything is still being compiled."""
    steps: int = 10
    """Timed steps."""
    seconds: float = 20.0
    """Where so many steps would take longer, fewer are timed, at least 3; warm-up shrinks too."""
    seed: int = 0
    """Of the weights, the data and the noise."""

    def __post_init__(self) -> None:
        for name, least in (("warmup", 1), ("steps", 1), ("seconds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Steps in milliseconds: all of them, and what they amount to."""

    warmup_steps: int
    first_step_seconds: float
    """Compilation included."""
    step_ms: tuple[float, ...]
    median_ms: float
    min_ms: float
    max_ms: float
    quartiles_ms: tuple[float, float]


def timing(step_ms: Sequence[float], *, warmup_steps: int, first_step_seconds: float) -> Timing:
    """Median, range and quartiles of the timed steps."""
    quartiles = (step_ms[0], step_ms[0])
    if len(step_ms) > 1:
        low, _, high = statistics.quantiles(step_ms, n=4, method="inclusive")
        quartiles = (low, high)
    return Timing(
        warmup_steps=warmup_steps,
        first_step_seconds=first_step_seconds,
        step_ms=tuple(step_ms),
        median_ms=statistics.median(step_ms),
        min_ms=min(step_ms),
        max_ms=max(step_ms),
        quartiles_ms=quartiles,
    )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One micro-batch that the search tried."""

    micro_batch: int
    samples_per_second: float | None
    """None: it did not fit."""
    peak_gib: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The step of one configuration, timed. Rates are per device and second."""

    model: str
    setting: str
    encoders: Encoders
    num_devices: int
    micro_batch: int
    latents: tuple[int, int, int, int]
    """Of a sample: channels, frames, rows, columns."""
    tokens_per_sample: int
    parameters: int
    timing: Timing
    samples_per_second: float
    tokens_per_second: float
    model_tflops: float
    """The transformer's own arithmetic, 6 FLOPs per multiply-add, no recomputation."""
    mfu: float | None
    """Of the published peak; None where there is none for the device."""
    peak_allocated_gib: float | None
    peak_reserved_gib: float | None
    precision: str
    compiled: bool
    checkpointing: str
    kernels: dict[str, str]
    """What each kind of layer runs on."""
    first_loss: float
    last_loss: float
    predicted_peak_gib: float | None = None
    """By the planner's formula, without encoders."""
    encode_ahead: bool = False
    """Whether the next micro-batch was encoded while this one was trained."""
    parts_ms: dict[str, float] = field(default_factory=dict)
    """With encoders on-line: what each part takes alone, of the same micro-batch."""
    sp: int = 1
    """Devices that shared the tokens of a micro-batch."""
    clocks: str | None = None
    """As the driver told them while the timed steps ran."""
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """`longtake bench step`: one configuration."""

    environment: dict[str, Any]
    protocol: Protocol
    config: dict[str, Any]
    measurement: Measurement | None = None
    failure: str | None = None
    """Why there is no measurement."""
    ceilings: Ceilings | None = None
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class MachineReport:
    """`longtake bench ceilings`: the machine and the best it can do."""

    environment: dict[str, Any]
    ceilings: Ceilings
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A throughput from elsewhere, per GPU, and what to know about it."""

    what: str
    samples_per_second: float
    gpu: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one side of a row."""

    config: dict[str, Any]
    measurement: Measurement | None = None
    failure: str | None = None
    note: str = ""
    """How it differs from what was asked for, if it does."""


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """One row of a table: Longtake's step, and the plain one of the same run."""

    key: str
    title: str
    fast: Outcome
    plain: Outcome | None = None
    speedup: float | None = None
    """Over the plain step, in samples per second."""
    baseline: str | None = None
    """The row that this one is to be compared with."""
    times_baseline: float | None = None
    """Its samples per second over those of the baseline."""
    floor_samples_per_second: float | None = None
    """By arithmetic from the run's own ceilings, for a step without encoders."""
    printed: tuple[Figure, ...] = ()
    """By Open-Sora 1.0, whose tables these rows are."""
    known: tuple[Figure, ...] = ()
    """The best that is known elsewhere."""


@dataclass(frozen=True, kw_only=True)
class TableReport:
    """`longtake bench table`: rows of one run on one machine."""

    table: str
    environment: dict[str, Any]
    protocol: Protocol
    ceilings: Ceilings | None = None
    rows: tuple[RowReport, ...] = field(default=())
    format: int = FORMAT


_Report = TypeVar("_Report", StepReport, TableReport, MachineReport)


def save_report(path: Path, report: Any) -> None:
    """Write a report as JSON; the file holds the old one or the new, never half of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def load_report(path: Path, kind: type[_Report]) -> _Report:
    """Read a report back. Raises: ValueError for a file that is not one, of this format."""
    return from_plain(_read(path), kind, source=str(path))


def load_any_report(path: Path) -> StepReport | TableReport:
    """A step's report or a table's, whichever the file holds."""
    if "table" in _read(path):
        return load_report(path, TableReport)
    return load_report(path, StepReport)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON: expected a file that bench wrote") from None
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} has format {found}, expected {FORMAT}: it is not a report of this version of "
            "longtake bench step or table; measure again"
        )
    return values
