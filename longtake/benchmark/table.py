"""A table, row by row: Longtake's step, the plain one beside it, the floor under both."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from longtake.benchmark.jobs import Finished, Job, RunJob
from longtake.benchmark.measure import Say, Sizing, StepOptions, as_plain, checkpointing_name
from longtake.benchmark.records import (
    MachineReport,
    Measurement,
    Outcome,
    Protocol,
    RowReport,
    TableReport,
    load_report,
)
from longtake.benchmark.rows import Policy, Row
from longtake.config import RunConfig, from_plain, to_plain
from longtake.parallel import attention_degrees
from longtake.planning import (
    Ceilings,
    exchanged_bytes,
    exchanges_again,
    floor_seconds,
    has_full_attention,
    ring_bytes,
    sharding_traffic,
    token_grid,
)


def select(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """The rows whose key fits one of the patterns (`stdit-*`); all of them without any.

    Raises: ValueError for a pattern that fits none.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatch(row.key, pattern) for row in rows):
            known = ", ".join(row.key for row in rows)
            raise ValueError(f"--rows {pattern} fits none of {known}")
    return [
        row for row in rows if not patterns or any(fnmatch.fnmatch(row.key, p) for p in patterns)
    ]


def measure_table(
    table: str,
    rows: Sequence[Row],
    *,
    machine: MachineReport,
    protocol: Protocol,
    run_job: RunJob,
    say: Say,
    earlier: TableReport | None = None,
    with_plain: bool = True,
    done: Callable[[TableReport], None] = lambda report: None,
) -> TableReport:
    """Measure the rows in their order; `done` gets the table after each side of each.

    Rows that `earlier` has are taken over. A side that failed there is measured again.
    """
    kept = {row.key: row for row in earlier.rows} if earlier else {}
    order = list(dict.fromkeys([*kept, *(row.key for row in rows)]))
    report = TableReport(
        table=table,
        environment=machine.environment,
        protocol=protocol,
        ceilings=machine.ceilings,
    )

    def keep(row: RowReport) -> None:
        nonlocal report
        kept[row.key] = row
        found = (_beside_baseline(kept[key], kept) for key in order if key in kept)
        report = replace(report, rows=tuple(found))
        done(report)

    for number, row in enumerate(rows, start=1):
        before = kept.get(row.key)
        say(f"row {number} of {len(rows)}: {row.title}")
        if before is not None and before.fast.measurement is not None:
            found = before
            say("  taken over")
        else:
            fast = _fast(row, kept, machine, protocol, run_job, say)
            found = RowReport(
                key=row.key,
                title=row.title,
                fast=fast,
                baseline=row.baseline,
                printed=row.printed,
                known=row.known,
            )
        keep(_compared(found, machine.ceilings))
        if row.has_plain and with_plain and not (found.plain and found.plain.measurement):
            size = found.fast.measurement.micro_batch if found.fast.measurement else None
            plain = _plain(row, size or row.micro_batch or 1, protocol, run_job, say)
            keep(_compared(replace(found, plain=plain), machine.ceilings))
    return report


def _fast(
    row: Row,
    measured: Mapping[str, RowReport],
    machine: MachineReport,
    protocol: Protocol,
    run_job: RunJob,
    say: Say,
) -> Outcome:
    """Longtake's own step under the first policy that fits, if the machine has the GPUs for it."""
    sizing: Sizing = "search" if row.micro_batch is None and row.gpus == 1 else "fixed"
    micro_batch = row.micro_batch
    if row.gpus > 1:
        baseline = measured.get(row.baseline or "")
        if micro_batch is None and baseline is not None and baseline.fast.measurement is not None:
            micro_batch = baseline.fast.measurement.micro_batch
        if skipped := _why_skipped(row, micro_batch, machine):
            say(f"  skipped: {skipped}")
            return Outcome(config=to_plain(row.config), failure=skipped)
    return _first_that_fits(
        row.config, row.policies, sizing, micro_batch, row, protocol, run_job, say
    )


def _why_skipped(row: Row, micro_batch: int | None, machine: MachineReport) -> str | None:
    """Why a row for several GPUs cannot be measured. Where there is no GPU at all, processes are
    as many as one likes."""
    device, gpus = machine.environment.get("device", {}), machine.environment.get("gpus", 1)
    if device.get("type") == "cuda" and gpus < row.gpus:
        return f"needs {row.gpus} GPUs, this machine has {gpus}"
    if micro_batch is None:
        return f"takes the micro-batch of row {row.baseline}: measure that with it"
    return None


def _plain(row: Row, micro_batch: int, protocol: Protocol, run_job: RunJob, say: Say) -> Outcome:
    """The plain step at the same micro-batch, or at the largest half of it that fits, or with every
    block recomputed."""
    say("  the same on plain torch")
    outcome = _first_that_fits(
        as_plain(row.config),
        (Policy("none"), Policy("full")),
        "halve",
        micro_batch,
        row,
        protocol,
        run_job,
        say,
    )
    found, notes = outcome.measurement, []
    if found is None:
        return outcome
    if found.checkpointing != "none":
        notes.append("does not fit without recomputing every block")
    if found.micro_batch < micro_batch:
        notes.append(f"micro-batch {micro_batch} does not fit")
    return replace(outcome, note="; ".join(notes))


def _first_that_fits(
    config: RunConfig,
    policies: Sequence[Policy],
    sizing: Sizing,
    micro_batch: int | None,
    row: Row,
    protocol: Protocol,
    run_job: RunJob,
    say: Say,
) -> Outcome:
    options = StepOptions(
        protocol=protocol, encoders=row.encoders, sizing=sizing, micro_batch=micro_batch
    )
    finished: Finished | None = None
    for policy in policies:
        own = policy.on(config)
        say(f"  activation checkpointing: {checkpointing_name(own.parallel)}")
        finished = run_job(Job(own, options, num_processes=row.gpus))
        if not finished.does_not_fit:
            break
    assert finished is not None, "a row has at least one policy"
    if finished.outcome.failure:
        say(f"  failed: {finished.outcome.failure}")
    return finished.outcome


def _compared(row: RowReport, ceilings: Ceilings) -> RowReport:
    """With what follows from both sides: the speed-up, and the floor at the row's micro-batch."""
    fast, plain = row.fast.measurement, row.plain and row.plain.measurement
    return replace(
        row,
        speedup=fast.samples_per_second / plain.samples_per_second if fast and plain else None,
        floor_samples_per_second=floor_rate(fast, row.fast.config, ceilings) if fast else None,
    )


def _beside_baseline(row: RowReport, rows: Mapping[str, RowReport]) -> RowReport:
    """With the speed-up over the row's baseline, if both were measured."""
    baseline = rows.get(row.baseline or "")
    slow, fast = baseline and baseline.fast.measurement, row.fast.measurement
    if slow is None or fast is None:
        return row
    return replace(row, times_baseline=fast.samples_per_second / slow.samples_per_second)


def floor_rate(measured: Measurement, config: dict[str, Any], ceilings: Ceilings) -> float | None:
    """Samples per second at the ceilings, the micro-batch being the measured one; None with
    encoders in the step or several devices, of whose links no ceiling is known."""
    if measured.encoders != "absent" or measured.num_devices > 1:
        return None
    run = from_plain(config, RunConfig, source="row")
    depth, hidden_size, _ = run.model.dimensions
    return 1 / floor_seconds(
        run.model.name,
        token_grid(measured.latents[1:], patch=run.model.patch_size),
        hidden_size=hidden_size,
        depth=depth,
        parameters=measured.parameters,
        micro_batch=measured.micro_batch,
        ceilings=ceilings,
        text_tokens=run.model.max_caption_tokens,
        mlp_ratio=run.model.mlp_ratio,
    )


def sent_bytes(measured: Measurement, config: dict[str, Any]) -> tuple[float, float]:
    """Bytes that leave a GPU in one step by formula: of tokens, and of weights and gradients.

    With F the bytes of all-to-alls in a forward, among n processes, and R those of a ring, tokens
    send (2 + again) F (n - 1) / n + (3 + again) R: a backward exchanges as much as a forward, and
    passes keys, values and the sums of their gradients on. `again` are forwards computed again.
    """
    run = from_plain(config, RunConfig, source="row")
    parallel, name, sp = run.parallel, run.model.name, measured.sp
    depth, hidden_size, num_heads = run.model.dimensions
    weight_bytes = 2 if measured.precision == "bf16" else 4
    full = has_full_attention(name)
    ring = attention_degrees(sp, num_heads)[1] if full else 1
    grid = token_grid(measured.latents[1:], patch=run.model.patch_size)
    how = {"hidden_size": hidden_size, "depth": depth, "sp": sp, "ring": ring}
    exchanged = exchanged_bytes(name, grid, **how, bytes_per_value=weight_bytes)
    around = ring_bytes(name, grid, **how, bytes_per_value=weight_bytes)
    kept_share = parallel.kept_blocks / depth
    again = exchanges_again(name, parallel.checkpointing, parallel.pieces, kept_share=kept_share)
    leaving = exchanged * (1 - ring / sp)
    of_tokens = measured.micro_batch * ((2 + again) * leaving + (3 + again) * around)

    # At level 0 nothing is sharded: every process is a replica.
    replicas = measured.num_devices if parallel.zero == 0 else parallel.dp_replicate
    sharding = sharding_traffic(
        measured.parameters,
        shards=measured.num_devices // replicas,
        replicas=replicas,
        gathers=2 if parallel.zero == 3 else 1,
        weight_bytes=weight_bytes,
    )
    return of_tokens, sharding.total


def earlier_table(
    folder: Path | None, rows: Sequence[Row], protocol: Protocol, *, is_resumed: bool
) -> TableReport | None:
    """The report in the folder that is to be completed, if there is one.

    Raises: ValueError if it must not be overwritten, or does not go with what is to be measured.
    """
    path = None if folder is None else folder / "table.json"
    if not is_resumed:
        if path is not None and path.exists():
            raise ValueError(f"{path} exists: add --resume to complete it, or name another folder")
        return None
    if path is None:
        raise ValueError("--resume completes the table in --output: name the folder")
    if not path.exists():
        return None
    earlier = load_report(path, TableReport)
    if earlier.protocol != protocol or not same_settings(earlier, rows):
        raise ValueError(
            f"{path} was measured with other settings or another protocol: give the same options, "
            "or name another folder"
        )
    return earlier


def taken_over(earlier: TableReport, environment: dict[str, Any]) -> dict[str, Any]:
    """What to note of rows taken over. Raises: ValueError if they are of another device."""
    before, now = (one.get("device", {}).get("name") for one in (earlier.environment, environment))
    if before != now:
        raise ValueError(f"the table to be completed was measured on {before}, this is {now}")
    commit = earlier.environment.get("taken_over_from") or earlier.environment.get("commit")
    return {"taken_over_from": commit} if commit != environment.get("commit") else {}


def same_settings(report: TableReport, rows: Sequence[Row]) -> bool:
    """Whether the report's rows were measured on these configurations, checkpointing aside."""
    wanted = {row.key: to_plain(row.config) for row in rows}
    for row in report.rows:
        if row.key in wanted:
            found = {**row.fast.config, "parallel": dict(row.fast.config["parallel"])}
            expected = {**wanted[row.key], "parallel": dict(wanted[row.key]["parallel"])}
            for policy in fields(Policy):
                found["parallel"][policy.name] = expected["parallel"][policy.name] = None
            if found != expected:
                return False
    return True
