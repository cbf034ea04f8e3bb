"""A table as text: for the terminal with rich, for `docs/benchmarks/` as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longtake.benchmark.measure import describe_step
from longtake.benchmark.protocol import describe_protocol
from longtake.benchmark.records import Measurement, Outcome, RowReport, StepReport, TableReport
from longtake.benchmark.table import floor_rate, sent_bytes
from longtake.planning import Ceilings

Cells = tuple[str, ...]

_SPEED = (
    "row",
    "micro-batch",
    "samples/s",
    "tokens/s",
    "ms/step (range; quartiles)",
    "model TFLOP/s",
    "MFU",
    "of matmul rate",
    "peak GiB",
    "times plain",
    "floor",
    "best elsewhere",
    "Open-Sora 1.0",
)
_ENCODERS = (
    "row",
    "samples/s",
    "times baseline",
    "transformer alone",
    "video encoder alone",
    "text encoder alone",
    "sum of the parts",
    "whole over sum",
)
_SEVERAL = (
    "row",
    "GPUs",
    "layout",
    "samples/s of all",
    "samples/s a GPU",
    "compared with",
    "times that",
    "price",
    "exchanged a step",
    "weights and gradients a step",
)
_MANNER = ("row", "precision", "checkpointing", "blocks", "encoders", "kernels", "steps", "search")
_ELSEWHERE = ("row", "what", "samples/s", "GPU", "note")

NOTES = (
    "Rates are per GPU. Model TFLOP/s count the transformer alone, 6 FLOPs per multiply-add, "
    "nothing recomputed; MFU is of the published dense bf16 peak (989 TFLOP/s on an H100, H200 or "
    "H800). *Of matmul rate* is the share of the rate measured in this run for an 8192³ bf16 "
    "product, then for the transformer's own product shapes. *Peak GiB* is allocated / reserved. "
    "*Plain torch* is the same step with explicit softmax, unfused norms, eager, in the same "
    "precision. *Floor* is the samples/s that this run's own ceilings allow by arithmetic, without "
    "overlap or tricks. *Sum of the parts*: the samples/s if transformer, video and text encoder, "
    "each timed alone at the same micro-batch, followed one another; ahead of it is what "
    "encoding ahead gains. *Price* is what a GPU loses against the row it is compared with: of "
    "sequence parallelism against two GPUs with samples each, of these and of the minute of 1080p "
    "against one GPU (below zero where it gains). Bytes "
    "are what leaves a GPU in a step, by formula. *Best elsewhere* was measured on one H200 "
    "without EMA and encoders; "
    "*Open-Sora 1.0* is as its page prints it, on 8 H800."
)


def show(report: TableReport, console: Console) -> None:
    """The table on a terminal, or as text elsewhere."""
    console = wide(console)
    console.print(f"[bold]{escape(headline(report))}[/]", highlight=False)
    console.print(escape(describe_protocol(report.protocol)), highlight=False)
    for title, headings, rows in _parts(report):
        grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for place, heading in enumerate(headings):
            is_number = headings is _SPEED and place > 0
            grid.add_column(heading, justify="right" if is_number else "left", overflow="fold")
        for cells in rows:
            grid.add_row(*map(escape, cells))
        console.print(grid)
    console.print(escape(ceilings_text(report.ceilings)), highlight=False)


def show_step(report: StepReport, console: Console, *, brief: bool) -> None:
    """One measured step: a line, or a table of a single row with its floor."""
    measured = report.measurement
    assert measured is not None
    if brief:
        times = measured.timing
        console.print(
            f"micro-batch {measured.micro_batch}: {number(measured.samples_per_second)} samples/s, "
            f"{number(times.median_ms)} ms ({number(times.min_ms)}–{number(times.max_ms)})",
            highlight=False,
            soft_wrap=True,
        )
        return
    floor = report.ceilings and floor_rate(measured, report.config, report.ceilings)
    row = RowReport(
        key="step",
        title=f"{measured.model} {measured.setting}"
        + ("" if measured.sp == 1 else f", sp={measured.sp}"),
        fast=Outcome(config=report.config, measurement=measured),
        floor_samples_per_second=floor,
    )
    table = TableReport(
        table="step",
        environment=report.environment,
        protocol=report.protocol,
        ceilings=report.ceilings,
        rows=(row,),
    )
    show(table, console)


def wide(console: Console) -> Console:
    """The same console; where it is no terminal, wide enough not to wrap tables."""
    if console.is_terminal:
        return console
    return Console(file=console.file, width=220, soft_wrap=True)


def markdown(report: TableReport) -> str:
    """The whole report, ready for `docs/benchmarks/`."""
    environment = report.environment
    device, gpu = environment.get("device", {}), environment.get("gpu") or {}
    packages = environment.get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    lines = [
        f"# {headline(report)}",
        "",
        "![Samples per second of every row](plot.png)",
        "",
        f"Measured {environment.get('started', '')} by",
        "",
        "```",
        " ".join(map(str, environment.get("command", []))),
        "```",
        "",
        f"**Machine**: {_flat(device)}{'; ' if gpu else ''}{_flat(gpu)}; "
        f"Python {environment.get('python', '')}; {versions}; commit {_commit(environment)}.",
        "",
        f"**Protocol**: {describe_protocol(report.protocol)}; seed {report.protocol.seed}. Each "
        "row in a process of its own. Random data without zeros; weights that training starts at "
        "zero are small random numbers instead.",
        "",
    ]
    for encoders in _kinds_of_encoders(report):
        lines += [f"**In a step, encoders {encoders}**: {describe_step(encoders)}.", ""]
    lines += [NOTES, ""]
    for title, headings, rows in _parts(report):
        lines += [f"## {title}", "", *_markdown_table(headings, rows), ""]
    lines += ["## Ceilings of this run", "", ceilings_text(report.ceilings), ""]
    return "\n".join(lines)


def headline(report: TableReport) -> str:
    """Which table, on what, when."""
    device = report.environment.get("device", {})
    name = device.get("name") or f"CPU, {device.get('threads', '?')} threads"
    date = str(report.environment.get("started", ""))[:10]
    command = "step" if report.table == "step" else f"table {report.table}"
    return f"longtake bench {command}: {name}, {date}"


def ceilings_text(ceilings: Ceilings | None) -> str:
    """The ceilings in a sentence."""
    if ceilings is None:
        return "Ceilings were not measured."
    attention = ", ".join(
        f"{flops / 1e12:.3g} at {keys}" for keys, flops in ceilings.attention_flops
    )
    return (
        f"Products: {ceilings.matmul_flops / 1e12:.4g} TFLOP/s (8192³ on a GPU), "
        f"{ceilings.linear_flops / 1e12:.4g} at the transformer's shapes. Copies: "
        f"{ceilings.copy_bytes / 1e12:.3g} TB/s read and written. Attention of PyTorch, heads of "
        f"72, forward and backward, TFLOP/s by keys: {attention}."
    )


def _parts(report: TableReport) -> list[tuple[str, Cells, list[Cells]]]:
    """Title, headings and rows of each part."""
    rows = report.rows
    parts = [
        ("Speed", _SPEED, [line for row in rows for line in _speed(row, report.ceilings)]),
        ("Encoders", _ENCODERS, [line for row in rows for line in _encoders(row)]),
        ("Several GPUs", _SEVERAL, [line for row in rows for line in _several(row)]),
        ("How each row ran", _MANNER, [line for row in rows for line in _manner(row)]),
        ("Figures from elsewhere", _ELSEWHERE, [line for row in rows for line in _elsewhere(row)]),
    ]
    return [part for part in parts if part[2]]


def _speed(row: RowReport, ceilings: Ceilings | None) -> list[Cells]:
    figures = (
        number(row.speedup, 3),
        number(row.floor_samples_per_second),
        ", ".join(number(figure.samples_per_second) for figure in row.known),
        ", ".join(number(figure.samples_per_second) for figure in row.printed),
    )
    lines = [(row.title, *_rates(row.fast, ceilings), *figures)]
    if row.plain is not None:
        lines.append(("  plain torch", *_rates(row.plain, ceilings), "", "", "", ""))
    return lines


def _rates(outcome: Outcome, ceilings: Ceilings | None) -> Cells:
    measured = outcome.measurement
    if measured is None:
        return (f"not measured: {outcome.failure}", *[""] * 7)
    times = measured.timing
    low, high = times.quartiles_ms
    shares = ""
    if ceilings is not None:
        rates = (ceilings.matmul_flops, ceilings.linear_flops)
        shares = " / ".join(f"{100e12 * measured.model_tflops / rate:.1f}" for rate in rates) + " %"
    peak = ""
    if measured.peak_allocated_gib is not None and measured.peak_reserved_gib is not None:
        peak = f"{measured.peak_allocated_gib:.1f} / {measured.peak_reserved_gib:.1f}"
    return (
        str(measured.micro_batch),
        number(measured.samples_per_second),
        number(measured.tokens_per_second, 3),
        f"{number(times.median_ms)} ({number(times.min_ms)}–{number(times.max_ms)}; "
        f"{number(low)}–{number(high)})",
        number(measured.model_tflops),
        "" if measured.mfu is None else f"{100 * measured.mfu:.1f} %",
        shares,
        peak,
    )


def _encoders(row: RowReport) -> list[Cells]:
    """The row's speed beside its baseline and beside its parts, if there is either."""
    measured = row.fast.measurement
    if measured is None or measured.num_devices > 1:
        return []
    if row.times_baseline is None and not measured.parts_ms:
        return []
    parts = measured.parts_ms

    def alone(part: str) -> str:
        ms = parts.get(part)
        return f"{number(ms)} ms, {number(1000 * measured.micro_batch / ms)}/s" if ms else ""

    total = sum(parts.values())
    of_parts = 1000 * measured.micro_batch / total if total else None
    return [
        (
            row.title,
            number(measured.samples_per_second),
            number(row.times_baseline, 3),
            *map(alone, ("transformer", "video encoder", "text encoder")),
            f"{number(total)} ms, {number(of_parts)}/s" if of_parts else "",
            number(measured.samples_per_second / of_parts, 3) if of_parts else "",
        )
    ]


def _several(row: RowReport) -> list[Cells]:
    """What several GPUs cost one another; nothing of rows on one."""
    measured = row.fast.measurement
    if measured is None or measured.num_devices == 1:
        return []
    exchanged, sharded = (f"{size / 1e9:.3g} GB" for size in sent_bytes(measured, row.fast.config))
    return [
        (
            row.title,
            str(measured.num_devices),
            f"dp={measured.num_devices // measured.sp}, sp={measured.sp}",
            number(measured.samples_per_second * measured.num_devices),
            number(measured.samples_per_second),
            row.baseline or "",
            number(row.times_baseline, 3),
            f"{1 - row.times_baseline:.1%}" if row.times_baseline else "–",
            exchanged,
            sharded,
        )
    ]


def _manner(row: RowReport) -> list[Cells]:
    lines = [(row.title, *_ran(row.fast))]
    if row.plain is not None:
        lines.append(("  plain torch", *_ran(row.plain)))
    return lines


def _ran(outcome: Outcome) -> Cells:
    measured = outcome.measurement
    if measured is None:
        return ("", "", "", "", "", "", outcome.note)
    times = measured.timing
    kernels = ", ".join(f"{layer} {name}" for layer, name in measured.kernels.items())
    return (
        measured.precision,
        measured.checkpointing,
        "compiled" if measured.compiled else "eager",
        measured.encoders + (", ahead" if measured.encode_ahead else ""),
        kernels,
        f"{times.warmup_steps} + {len(times.step_ms)}",
        "; ".join(filter(None, [_trials(measured), outcome.note])),
    )


def _trials(measured: Measurement) -> str:
    """Micro-batch: samples per second, of everything that the search tried."""
    tried = (
        f"{trial.micro_batch}: {number(trial.samples_per_second)}" for trial in measured.trials
    )
    return ", ".join(tried)


def _elsewhere(row: RowReport) -> list[Cells]:
    return [
        (row.title, figure.what, number(figure.samples_per_second), figure.gpu, figure.note)
        for figure in (*row.printed, *row.known)
    ]


def _kinds_of_encoders(report: TableReport) -> list[Any]:
    found = (row.fast.measurement.encoders for row in report.rows if row.fast.measurement)
    return sorted(set(found))


def _commit(environment: dict[str, Any]) -> str:
    commit = environment.get("commit") or "unknown"
    earlier = environment.get("taken_over_from")
    return f"{commit}; some rows were taken over from a run of {earlier}" if earlier else commit


def _flat(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _markdown_table(headings: Sequence[str], rows: Iterable[Cells]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


def number(value: float | None, digits: int = 4) -> str:
    """A number to so many digits, thousands as k; "–" for none."""
    if value is None:
        return "–"
    if abs(value) >= 10_000:
        return f"{value / 1000:.{digits}g}k"
    return f"{value:.{digits}g}"
