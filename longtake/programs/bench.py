"""Bench: how fast this machine trains, by a fixed protocol, beside plain torch and a floor.

longtake bench table images|video|encoders|all [--output DIR]
longtake bench step --preset NAME [overrides as in train]
longtake bench profile --preset NAME [overrides as in train]
longtake bench ops [--only "attention*"]
longtake bench curve --preset NAME --output DIR [overrides as in train]
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
from longtake.benchmark.curve import CurveReport, curve_markdown, measure_curve, plot_curve
from longtake.benchmark.inputs import with_buckets
from longtake.benchmark.jobs import DOES_NOT_FIT, ask_machine, run_in_process, stopwatch
from longtake.benchmark.machine import describe_machine
from longtake.benchmark.measure import (
    Sizing,
    StepOptions,
    describe_step,
    free_memory,
    measure_step,
)
from longtake.benchmark.operations import TINY, Shapes
from longtake.benchmark.ops import OpsReport, measure_operations, show_operations
from longtake.benchmark.plot import plot_table
from longtake.benchmark.profile import ProfileReport, profile_step, show_profile
from longtake.benchmark.protocol import describe_protocol
from longtake.benchmark.records import (
    Encoders,
    MachineReport,
    Protocol,
    StepReport,
    TableReport,
    load_any_report,
    save_report,
)
from longtake.benchmark.render import ceilings_text, markdown, number, show, show_step
from longtake.benchmark.rows import Row, rows, tiny
from longtake.benchmark.search import DoesNotFit
from longtake.benchmark.table import earlier_table, measure_table, select, taken_over
from longtake.config import RunConfig, as_options, override, parse_run, to_plain
from longtake.parallel import Mesh, build_mesh, start_distributed, stop_distributed


def main(arguments: Sequence[str]) -> int:
    """`longtake bench`: the exit status is 3 if a step does not fit into memory, 1 if a comparison
    found something worse."""
    programs: dict[str, Callable[[list[str]], int]] = {
        "table": _table,
        "step": _step,
        "profile": _profile,
        "ops": _ops,
        "curve": _curve,
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
    try:
        return programs[rest[0]](rest[1:])
    except DoesNotFit as error:
        advice = "a smaller --micro-batch, --sizing search or --parallel.checkpointing full may fit"
        print(f"error: {error}: {advice}", file=sys.stderr)
        return DOES_NOT_FIT


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
    earlier = earlier_table(command.output, chosen, command.protocol, is_resumed=command.resume)
    machine = ask_machine(say=say)
    environment = machine.environment | {"command": ["longtake", "bench", "table", *arguments]}
    if earlier is not None:
        environment |= taken_over(earlier, environment)
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


def _write(folder: Path | None, report: TableReport) -> None:
    if folder is not None:
        save_report(folder / "table.json", report)
        (folder / "table.md").write_text(markdown(report), encoding="utf-8")


_STEP = """\
Time the step of one configuration: --preset NAME or --config FILE, dotted overrides as in train.

  --micro-batch N        samples per step and process (with sp: per group of processes that share
                         their tokens); default: the bucket's batch size, shared by all
  --sizing HOW           fixed; halve (until it fits); search (the best, from N or from a guess on)
  --encoders WHAT        absent (random latents; the default), on-line, or cached (as from a store)
  --bucket I             which of the configuration's buckets, from 0
  --warmup, --steps, --seconds, --seed   the protocol
  --json FILE            write the report
  --no-ceilings          do not measure this device's ceilings
  --brief                print one line
"""


def _step(arguments: list[str]) -> int:
    chosen, rest = _step_parser("longtake bench step").parse_known_args(arguments)
    config = parse_run(rest, prog="longtake bench step", description=_STEP)
    options = _options(chosen)
    with ExitStack() as at_exit:
        mesh = _start(config, at_exit)
        say = _printer(mesh)
        if not chosen.brief:
            say(f"In a step: {describe_step(options.encoders)}.")
            say(f"Protocol: {describe_protocol(options.protocol)}.")
        report = StepReport(
            environment=describe_machine(mesh.device),
            protocol=options.protocol,
            config=to_plain(config),
        )
        try:
            report = replace(report, measurement=measure_step(config, mesh, options, say))
        except DoesNotFit as error:
            if chosen.json is not None:
                save_report(chosen.json, replace(report, failure=str(error)))
            raise
        if chosen.ceilings:
            free_memory(mesh.device)
            report = replace(report, ceilings=measure_ceilings(mesh.device))
        if mesh.is_first:
            if chosen.json is not None:
                save_report(chosen.json, report)
            show_step(report, Console(), brief=chosen.brief)
    return 0


_PROFILE = """\
Split the step of a configuration into its parts and name its costliest kernels: --preset NAME or
--config FILE, dotted overrides as in train. Buckets take turns.

  --micro-batch N        samples per step and process; default: each bucket's batch size
  --also-bucket FxHxW    one more shape (frames, pixels, pixels), to see what alternating costs
  --encoders WHAT        absent (random latents; the default), on-line, or cached (as from a store)
  --profiled-steps N     of each bucket; default 3
  --trace FILE           keep the profiler's trace, for chrome://tracing or Perfetto
  --warmup, --steps, --seconds, --seed   the protocol of the steps before
  --json FILE            write the report
"""


def _profile(arguments: list[str]) -> int:
    parser = _step_parser("longtake bench profile")
    parser.add_argument("--also-bucket", action="append", default=[])
    parser.add_argument("--profiled-steps", type=int, default=3)
    parser.add_argument("--trace", type=Path)
    chosen, rest = parser.parse_known_args(arguments)
    config = parse_run(rest, prog="longtake bench profile", description=_PROFILE)
    config = with_buckets(config, chosen.also_bucket)
    options = _options(chosen)
    with ExitStack() as at_exit:
        mesh = _start(config, at_exit)
        found = profile_step(
            config,
            mesh,
            options,
            steps=chosen.profiled_steps,
            trace=chosen.trace,
            say=_printer(mesh),
        )
        if mesh.is_first:
            show_profile(found, Console())
            if chosen.json is not None:
                report = ProfileReport(
                    environment=describe_machine(mesh.device),
                    protocol=options.protocol,
                    config=to_plain(config),
                    profile=found,
                )
                save_report(chosen.json, report)
    return 0


def _step_parser(prog: str) -> argparse.ArgumentParser:
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


def _options(chosen: argparse.Namespace) -> StepOptions:
    return StepOptions(
        protocol=Protocol(
            warmup=chosen.warmup, steps=chosen.steps, seconds=chosen.seconds, seed=chosen.seed
        ),
        encoders=chosen.encoders,
        sizing=chosen.sizing,
        micro_batch=chosen.micro_batch,
        bucket=chosen.bucket,
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


_CURVE = """\
Train one configuration on the fast path, on plain torch in the same precision and on plain fp32
torch, and compare the losses: --preset NAME or --config FILE, dotted overrides as in train. Needs
real clips, as train does.

  --curve-steps N        optimizer steps of each run; default 200
  --output DIR           folder for curve.json, curve.md, curve.png and the runs
"""


def _curve(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="longtake bench curve", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--curve-steps", type=int, default=200)
    parser.add_argument("--output", type=Path, required=True)
    options, rest = parser.parse_known_args(arguments)
    config = parse_run(rest, prog="longtake bench curve", description=_CURVE)
    folder: Path = options.output
    curve = measure_curve(config, folder, steps=options.curve_steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    command = ["longtake", "bench", "curve", *arguments]
    report = CurveReport(
        environment=describe_machine(device) | {"command": command},
        config=to_plain(config),
        curve=curve,
    )
    save_report(folder / "curve.json", report)
    (folder / "curve.md").write_text(curve_markdown(report), encoding="utf-8")
    try:
        plot_curve(curve, folder / "curve.png")
    except ImportError as error:
        print(f"no plot: {error}")
    print(
        f"{len(curve.steps)} steps; a loss differs from plain fp32's, fast path: "
        f"{curve.difference(curve.fast)}; plain in its precision: "
        f"{curve.difference(curve.plain_same)}"
    )
    print(f"written: {folder}")
    return 0


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
class OpsCommand:
    """Time each operation alone, forward and backward, in every implementation that runs here."""

    only: tuple[str, ...] = ()
    """Operations whose name fits one of these patterns, such as "attention*"."""
    size: Literal["full", "tiny"] = "full"
    """tiny tries the command on any machine."""
    json: Path | None = None
    """Write the report there, anew after every operation."""


def _ops(arguments: list[str]) -> int:
    command = tyro.cli(OpsCommand, prog="longtake bench ops", args=arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say = stopwatch(lambda text: print(text, flush=True))
    shapes = Shapes() if command.size == "full" else TINY
    say("ceilings")
    report = OpsReport(
        environment=describe_machine(device), ceilings=measure_ceilings(device), times=()
    )
    for time in measure_operations(shapes, device, report.ceilings, only=command.only, say=say):
        report = replace(report, times=(*report.times, time))
        if command.json is not None:
            save_report(command.json, report)
    show_operations(report.times, Console())
    print(ceilings_text(report.ceilings))
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
