"""Two reports of the same rows: what became slower, faster, or takes more memory."""

from __future__ import annotations

from dataclasses import dataclass

from longtake.benchmark.records import Measurement, StepReport, TableReport


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One step in both reports. Rates in samples per second."""

    name: str
    before: Measurement | None
    after: Measurement | None
    verdict: str
    is_worse: bool

    @property
    def ratio(self) -> float | None:
        """After over before: above 1 is faster."""
        if self.before is None or self.after is None:
            return None
        return self.after.samples_per_second / self.before.samples_per_second


def compare(
    before: StepReport | TableReport, after: StepReport | TableReport, *, tolerance: float = 0.03
) -> list[Difference]:
    """Every step that either report has, by name.

    A step is slower if its rate fell by more than the tolerance and the ranges of its times do not
    even touch; memory is worse if the peak grew by more than the tolerance. A step that was
    measured before and now is not counts as worse.

    Raises: ValueError if the reports have no step in common.
    """
    first, second = _steps(before), _steps(after)
    if not first.keys() & second.keys():
        raise ValueError(
            f"the reports have no row in common: one has {', '.join(first) or 'none'}, the other "
            f"{', '.join(second) or 'none'}"
        )
    names = list(dict.fromkeys([*first, *second]))
    return [_difference(name, first.get(name), second.get(name), tolerance) for name in names]


def _difference(
    name: str, before: Measurement | None, after: Measurement | None, tolerance: float
) -> Difference:
    verdict, is_worse = _judge(before, after, tolerance)
    return Difference(name=name, before=before, after=after, verdict=verdict, is_worse=is_worse)


def _judge(
    before: Measurement | None, after: Measurement | None, tolerance: float
) -> tuple[str, bool]:
    if after is None:
        return "no longer measured", before is not None
    if before is None:
        return "new", False
    ratio = after.samples_per_second / before.samples_per_second
    verdicts, is_worse = [], False
    # Per sample: the micro-batch may differ.
    old = [time / before.micro_batch for time in (before.timing.min_ms, before.timing.max_ms)]
    new = [time / after.micro_batch for time in (after.timing.min_ms, after.timing.max_ms)]
    if ratio < 1 - tolerance and new[0] > old[1]:
        verdicts.append("slower")
        is_worse = True
    elif ratio > 1 + tolerance and new[1] < old[0]:
        verdicts.append("faster")
    if before.micro_batch != after.micro_batch:
        verdicts.append(f"micro-batch {before.micro_batch} → {after.micro_batch}")
    elif _grew(before.peak_allocated_gib, after.peak_allocated_gib, tolerance):
        verdicts.append("more memory")
        is_worse = True
    return ", ".join(verdicts) or "as before", is_worse


def _grew(before: float | None, after: float | None, tolerance: float) -> bool:
    return before is not None and after is not None and after > before * (1 + tolerance)


def _steps(report: StepReport | TableReport) -> dict[str, Measurement | None]:
    """Every step of a report under a name that the same step has in another report."""
    if isinstance(report, StepReport):
        measured = report.measurement
        if measured is None:
            return {}
        return {f"{measured.model} {measured.setting}, encoders {measured.encoders}": measured}
    found: dict[str, Measurement | None] = {}
    for row in report.rows:
        found[row.key] = row.fast.measurement
        if row.plain is not None:
            found[f"{row.key}, plain"] = row.plain.measurement
    return found
