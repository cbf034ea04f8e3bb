"""Bench: how fast this machine trains, by a fixed protocol, beside plain torch and a floor.

longtake bench table images|video|encoders|all [--output DIR]
longtake bench step --preset NAME [overrides as in train]
longtake bench profile --preset NAME [overrides as in train]
longtake bench ceilings
longtake bench compare before.json after.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longtake.benchmark.ceilings import measure_ceilings
from longtake.benchmark.compare import compare
from longtake.benchmark.jobs import DOES_NOT_FIT, ask_machine, run_in_process, stopwatch
from longtake.benchmark.machine import describe_machine
from longtake.benchmark.measure import (
    Sizing,
    StepOptions,
    describe_step,
    free_memory,
    measure_step,
)
from longtake.benchmark.plot import plot_table
from longtake.benchmark.profile import ProfileReport, profile_step, show_profile
from longtake.benchmark.protocol import describe_protocol
from longtake.benchmark.records import (
    Encoders,
    MachineReport,
    Outcome,
    Protocol,
    RowReport,
    StepReport,
    TableReport,
    load_any_report,
    load_report,
    save_report,
)
from longtake.benchmark.render import ceilings_text, markdown, number, show
from longtake.benchmark.rows import Row, rows, tiny
from longtake.benchmark.search import DoesNotFit
from longtake.benchmark.table import floor_rate, measure_table, same_settings, select
from longtake.config import RunConfig, as_options, override, parse_run, to_plain
from longtake.parallel import Mesh, build_mesh, start_distributed, stop_distributed


def main(arguments: Sequence[str]) -> int:
    """`longtake bench`: the exit status is 3 if a step does not fit into memory, 1 if a comparison
    found something worse."""
    programs: dict[str, Callable[[list[str]], int]] = {
        "table": _table,
        "step": _step,
        "profile": _profile,
        "ceilings": _ceilings,
        "compare": _compare,
    }
    rest = list(arguments)
    if rest[:1] == ["--compare"]:
        rest[0] = "compare"
    if not rest or rest[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0
    if rest[0] not in programs:
        raise ValueError(f"bench {rest[0]} does not exist: use {', '.join(programs)}")
    return programs[rest[0]](rest[1:])


@dataclass(frozen=True, kw_only=True)
class TableCommand:
    """Measure the rows of a table, each in a process of its own, and plain torch beside each."""

    table: tyro.conf.Positional[Literal["images", "video", "encoders", "all"]]
    rows: tuple[str, ...] = ()
    """Only rows whose key fits one of these patterns, such as stdit-*."""
    output: Path | None = None
    """Folder for table.json, table.md and plot.png, written anew after every row."""
    resume: bool = False
    """Measure only what the table in the output folder lacks."""
    plain: bool = True
    """Measure plain torch beside each row."""
    size: Literal["full", "tiny"] = "full"
    """tiny tries the command on any machine: small models and clips, figures that mean nothing."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Override of every row's configuration: --set key=value, repeatable."""
    row_timeout: float = 600.0
    """Seconds after which a process is given up."""
    list: bool = False
    """Say which rows there are, and stop."""
    compare: tuple[Path, Path] | None = None
    """Compare two reports instead of measuring."""
    protocol: Annotated[Protocol, tyro.conf.arg(name="")] = field(default_factory=Protocol)


def _table(arguments: list[str]) -> int:
    if "--compare" in arguments:
        return _compare(arguments[arguments.index("--compare") + 1 :])
    command = tyro.cli(
        TableCommand,
        prog="longtake bench table",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    console = Console()
    chosen = _rows(command)
    if command.list:
        for row in chosen:
            print(f"{row.key:34} {row.title}")
        return 0
    say = stopwatch(lambda text: print(text, flush=True))
    earlier = _earlier(command, chosen)
    machine = ask_machine(say=say)
    environment = machine.environment | {"command": ["longtake", "bench", "table", *arguments]}
    if earlier is not None:
        environment |= _same_machine(earlier, environment)
    report = measure_table(
        command.table,
        chosen,
        machine=replace(machine, environment=environment),
        protocol=command.protocol,
        run_job=lambda job: run_in_process(
            job, say=lambda line: say(f"    {line}"), timeout_seconds=command.row_timeout
        ),
        say=say,
        earlier=earlier,
        with_plain=command.plain,
        done=lambda report: _write(command.output, report),
    )
    show(report, console)
    if command.output is not None:
        try:
            plot_table(report, command.output / "plot.png")
        except ImportError as error:
            say(f"no plot: {error}")
        say(f"written: {command.output}")
    return 0 if any(row.fast.measurement for row in report.rows) else 1


def _rows(command: TableCommand) -> list[Row]:
    chosen = select(rows(command.table), command.rows)
    if command.size == "tiny":
        chosen = [tiny(row) for row in chosen]
    options = as_options(command.set)
    return [
        replace(row, config=override(row.config, options, prog="longtake bench table --set"))
        for row in chosen
    ]


def _earlier(command: TableCommand, chosen: Sequence[Row]) -> TableReport | None:
    """The report to be completed."""
    path = None if command.output is None else command.output / "table.json"
    if not command.resume:
        if path is not None and path.exists():
            raise ValueError(f"{path} exists: add --resume to complete it, or name another folder")
        return None
    if path is None:
        raise ValueError("--resume completes the table in --output: name the folder")
    if not path.exists():
        return None
    earlier = load_report(path, TableReport)
    if earlier.protocol != command.protocol or not same_settings(earlier, chosen):
        raise ValueError(
            f"{path} was measured with other settings or another protocol: give the same options, "
            "or name another folder"
        )
    return earlier


def _same_machine(earlier: TableReport, environment: dict) -> dict[str, object]:
    """What to note of rows taken over. Raises: ValueError if they are of another device."""
    before, now = (one.get("device", {}).get("name") for one in (earlier.environment, environment))
    if before != now:
        raise ValueError(f"the table to be completed was measured on {before}, this is {now}")
    commit = earlier.environment.get("taken_over_from") or earlier.environment.get("commit")
    return {"taken_over_from": commit} if commit != environment.get("commit") else {}


def _write(folder: Path | None, report: TableReport) -> None:
    if folder is not None:
        save_report(folder / "table.json", report)
        (folder / "table.md").write_text(markdown(report), encoding="utf-8")


_STEP = """\
Time the step of one configuration: --preset NAME or --config FILE, dotted overrides as in train.

  --micro-batch N        samples per step and process; default: the bucket's batch size
  --sizing HOW           fixed; halve (until it fits); search (the best, from N or from a guess on)
  --encoders WHAT        absent (random latents; the default) or on-line
  --bucket I             which of the configuration's buckets, from 0
  --warmup, --steps, --seconds, --seed   the protocol
  --json FILE            write the report
  --no-ceilings          do not measure this device's ceilings
  --brief                print one line
"""


def _step(arguments: list[str]) -> int:
    options, rest = _step_options("longtake bench step").parse_known_args(arguments)
    config = parse_run(rest, prog="longtake bench step", description=_STEP)
    with ExitStack() as at_exit:
        mesh = _start(config, at_exit)
        say = _printer(mesh)
        protocol = _protocol(options)
        if not options.brief:
            say(f"In a step: {describe_step(options.encoders)}.")
            say(f"Protocol: {describe_protocol(protocol)}.")
        report = StepReport(
            environment=describe_machine(mesh.device), protocol=protocol, config=to_plain(config)
        )
        status = 0
        try:
            measured = measure_step(
                config,
                mesh,
                StepOptions(
                    protocol=protocol,
                    encoders=options.encoders,
                    sizing=options.sizing,
                    micro_batch=options.micro_batch,
                    bucket=options.bucket,
                ),
                say,
            )
            report = replace(report, measurement=measured)
        except DoesNotFit as error:
            say(
                f"{error}: a smaller --micro-batch, --sizing search, or more "
                "--parallel.checkpointing may fit"
            )
            report = replace(report, failure=str(error))
            status = DOES_NOT_FIT
        if options.ceilings and status == 0:
            free_memory(mesh.device)
            report = replace(report, ceilings=measure_ceilings(mesh.device))
        if mesh.is_first:
            if options.json is not None:
                save_report(options.json, report)
            if report.measurement is not None:
                _show_step(report, brief=options.brief)
        return status


_PROFILE = """\
Split the step of a configuration into its parts and name its costliest kernels: --preset NAME or
--config FILE, dotted overrides as in train. Buckets take turns.

  --micro-batch N        samples per step and process; default: each bucket's batch size
  --also-bucket FxHxW    one more shape (frames, pixels, pixels), to see what alternating costs
  --encoders WHAT        absent (random latents; the default) or on-line
  --profiled-steps N     of each bucket; default 3
  --trace FILE           keep the profiler's trace, for chrome://tracing or Perfetto
  --warmup, --steps, --seconds, --seed   the protocol of the steps before
  --json FILE            write the report
"""


def _profile(arguments: list[str]) -> int:
    parser = _step_options("longtake bench profile")
    parser.add_argument("--also-bucket", action="append", default=[])
    parser.add_argument("--profiled-steps", type=int, default=3)
    parser.add_argument("--trace", type=Path)
    options, rest = parser.parse_known_args(arguments)
    config = parse_run(rest, prog="longtake bench profile", description=_PROFILE)
    config = _with_buckets(config, options.also_bucket)
    with ExitStack() as at_exit:
        mesh = _start(config, at_exit)
        found = profile_step(
            config,
            mesh,
            StepOptions(
                protocol=_protocol(options),
                encoders=options.encoders,
                micro_batch=options.micro_batch,
            ),
            steps=options.profiled_steps,
            trace=options.trace,
            say=_printer(mesh),
        )
        if mesh.is_first:
            show_profile(found, Console())
            if options.json is not None:
                report = ProfileReport(
                    environment=describe_machine(mesh.device),
                    protocol=_protocol(options),
                    config=to_plain(config),
                    profile=found,
                )
                save_report(options.json, report)
    return 0


def _with_buckets(config: RunConfig, texts: Sequence[str]) -> RunConfig:
    """The configuration with more buckets, as large in pixels as the first as samples allow."""
    first = config.data.buckets[0]
    buckets = list(config.data.buckets)
    pixels = first.batch_size * first.num_frames * first.height * first.width
    for text in texts:
        sizes = text.split("x")
        if len(sizes) != 3 or not all(size.isdigit() for size in sizes):
            raise ValueError(f"--also-bucket {text}: expected frames x height x width, 16x512x512")
        frames, height, width = map(int, sizes)
        batch_size = max(1, pixels // max(1, frames * height * width))
        bucket = replace(
            first, num_frames=frames, height=height, width=width, batch_size=batch_size
        )
        buckets.append(bucket)
    return replace(config, data=replace(config.data, buckets=tuple(buckets)))


def _step_options(prog: str) -> argparse.ArgumentParser:
    default = Protocol()
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--sizing", choices=get_args(Sizing), default="fixed")
    parser.add_argument("--encoders", choices=get_args(Encoders), default="absent")
    parser.add_argument("--bucket", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=default.warmup)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-ceilings", dest="ceilings", action="store_false")
    parser.add_argument("--brief", action="store_true")
    return parser


def _protocol(options: argparse.Namespace) -> Protocol:
    return Protocol(
        warmup=options.warmup, steps=options.steps, seconds=options.seconds, seed=options.seed
    )


def _start(config: RunConfig, at_exit: ExitStack) -> Mesh:
    device = start_distributed(timeout_seconds=config.parallel.timeout_seconds)
    at_exit.callback(stop_distributed)
    return build_mesh(config.parallel, device)


def _printer(mesh: Mesh) -> Callable[[str], None]:
    def say(text: str) -> None:
        if mesh.is_first:
            print(text, flush=True)

    return say


def _show_step(report: StepReport, *, brief: bool) -> None:
    measured = report.measurement
    assert measured is not None
    if brief:
        times = measured.timing
        print(
            f"micro-batch {measured.micro_batch}: {number(measured.samples_per_second)} samples/s, "
            f"{number(times.median_ms)} ms ({number(times.min_ms)}–{number(times.max_ms)})"
        )
        return
    floor = None
    if report.ceilings is not None:
        floor = floor_rate(measured, report.config, report.ceilings)
    row = RowReport(
        key="step",
        title=f"{measured.model} {measured.setting}",
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
    show(table, Console())


@dataclass(frozen=True, kw_only=True)
class CeilingsCommand:
    """Measure what this device can do at best."""

    json: Path | None = None
    """Write machine and ceilings there."""


def _ceilings(arguments: list[str]) -> int:
    command = tyro.cli(CeilingsCommand, prog="longtake bench ceilings", args=arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = MachineReport(environment=describe_machine(device), ceilings=measure_ceilings(device))
    print(ceilings_text(report.ceilings))
    if command.json is not None:
        save_report(command.json, report)
    return 0


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Compare two reports of bench; exit status 1 if something became worse."""

    reports: tyro.conf.Positional[tuple[Path, Path]]
    """Before and after."""
    tolerance: float = 0.03
    """Changes up to this share are noise."""


def _compare(arguments: list[str]) -> int:
    command = tyro.cli(CompareCommand, prog="longtake bench compare", args=arguments)
    before, after = map(load_any_report, command.reports)
    differences = compare(before, after, tolerance=command.tolerance)
    table = Table(title=f"{command.reports[0]} → {command.reports[1]}", title_justify="left")
    for heading in ("step", "before", "after", "ratio", "verdict"):
        table.add_column(heading)
    for one in differences:
        rates = (side.samples_per_second if side else None for side in (one.before, one.after))
        verdict = f"[red]{escape(one.verdict)}[/]" if one.is_worse else escape(one.verdict)
        table.add_row(escape(one.name), *map(number, rates), number(one.ratio, 3), verdict)
    Console().print(table)
    return 1 if any(one.is_worse for one in differences) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
