"""Where a step's time goes: its parts, its costliest kernels, what was compiled meanwhile."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from longtake.benchmark.graphs import Graphs, count_graphs, describe_graphs
from longtake.benchmark.inputs import latent_shape
from longtake.benchmark.measure import Say, StepOptions, is_out_of_memory
from longtake.benchmark.protocol import time_steps
from longtake.benchmark.records import FORMAT, Protocol
from longtake.benchmark.render import number, wide
from longtake.benchmark.search import DoesNotFit
from longtake.benchmark.subject import Subject
from longtake.benchmark.trace import PARTS, STEP, Split, split_step
from longtake.config import RunConfig, verify_kernels
from longtake.ops.kernels import kernels_as
from longtake.parallel import Mesh

# Kernels in the table; a report in JSON has more.
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was found out about a configuration's step; several buckets take turns."""

    buckets: tuple[str, ...]
    micro_batches: tuple[int, ...]
    unprofiled_step_ms: float
    """The mean of steps timed by the protocol, as many of each bucket, before the profiler slowed
    the host down."""
    split: Split
    graphs: Graphs
    compiled_meanwhile: int
    """Graphs compiled while steps were timed and profiled, after warm-up: must be 0."""


@dataclass(frozen=True, kw_only=True)
class ProfileReport:
    """`longtake bench profile`."""

    environment: dict[str, Any]
    protocol: Protocol
    config: dict[str, Any]
    profile: Profile
    format: int = FORMAT


def profile_step(
    config: RunConfig,
    mesh: Mesh,
    options: StepOptions,
    *,
    steps: int = 3,
    trace: Path | None = None,
    say: Say = lambda text: None,
) -> Profile:
    """Profile steps of all buckets in turn, `steps` of each; `trace` keeps the profiler's file.

    Raises: DoesNotFit if the device's memory cannot hold them.
    """
    try:
        with kernels_as(config.kernels):
            return _profile_buckets(config, mesh, options, steps, trace, say)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise DoesNotFit("out of memory") from None
        raise


def _profile_buckets(
    config: RunConfig, mesh: Mesh, options: StepOptions, steps: int, trace: Path | None, say: Say
) -> Profile:
    buckets = config.data.buckets
    if mesh.device.type == "cuda":
        # As training does: else other kernels would be profiled than those that it takes.
        shapes = [latent_shape(config, bucket)[1:] for bucket in buckets]
        for reason in verify_kernels(config, shapes, mesh.device):
            say(f"not used, its check failed: {reason}")
    subject = Subject(config, mesh, encoders=options.encoders, seed=options.protocol.seed)
    workloads = [
        subject.workload(number, options.micro_batch or max(1, bucket.batch_size // mesh.dp_size))
        for number, bucket in enumerate(buckets)
    ]
    turns = cycle(workloads)

    def run() -> None:
        subject.step(next(turns))

    say("warming up, then timing without the profiler")
    for _ in buckets:
        run()
    timed, _ = time_steps(run, mesh.device, options.protocol, turns=len(buckets))
    graphs = count_graphs()
    say("profiling")
    split = _profiled(run, 1 + steps * len(buckets), mesh, trace)
    return Profile(
        buckets=tuple(map(str, buckets)),
        micro_batches=tuple(workload.micro_batch for workload in workloads),
        unprofiled_step_ms=fmean(timed.step_ms),
        split=split,
        graphs=describe_graphs(),
        compiled_meanwhile=count_graphs() - graphs,
    )


def _profiled(run: Callable[[], None], steps: int, mesh: Mesh, trace: Path | None) -> Split:
    activities = [ProfilerActivity.CPU]
    if mesh.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                run()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        # One file has one writer; the other processes' traces are only read.
        path = trace if trace and mesh.is_first else Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        with open(path, encoding="utf-8", errors="replace") as file:
            return split_step(json.load(file)["traceEvents"])


def show_profile(found: Profile, console: Console) -> None:
    """Both tables, and what compilation did."""
    console, split = wide(console), found.split
    shapes = ", ".join(
        f"{bucket} at micro-batch {size}"
        for bucket, size in zip(found.buckets, found.micro_batches, strict=True)
    )
    console.print(f"Steps of {shapes}", highlight=False)
    parts = Table(title="Parts of a step", title_justify="left")
    for heading in ("part", "ms", "share"):
        parts.add_column(heading, justify="left" if heading == "part" else "right")
    for part in PARTS:
        if ms := split.parts_ms[part]:
            parts.add_row(part, number(ms), f"{100 * ms / split.step_ms:.1f} %")
    parts.add_row("all", number(split.step_ms), "100 %")
    console.print(parts)
    costliest = Table(title="Costliest kernels", title_justify="left")
    for heading in ("ms/step", "share", "launches", "kernel"):
        costliest.add_column(heading, justify="left" if heading == "kernel" else "right")
    for kernel in split.costliest[:_SHOWN]:
        share = f"{100 * kernel.share:.1f} %"
        costliest.add_row(number(kernel.ms), share, f"{kernel.count:g}", escape(kernel.name[:120]))
    console.print(costliest)
    for line in profile_notes(found):
        console.print(escape(line), highlight=False, soft_wrap=True)


def profile_notes(found: Profile) -> list[str]:
    """What the tables leave out."""
    split, graphs = found.split, found.graphs
    breaks = sum(graphs.breaks.values())
    lines = [
        f"{split.launches:g} kernels and {split.copies:g} copies and fills a step; without "
        f"the profiler a step takes {number(found.unprofiled_step_ms)} ms",
        f"{graphs.compiled} graphs compiled, {found.compiled_meanwhile} of them in the profiled "
        f"steps; {breaks} graph breaks, {len(graphs.recompiled)} reasons of recompilation",
    ]
    if split.encode_ms:
        hidden = split.encode_ms - split.parts_ms["encode"]
        lines.append(
            f"encoding: {number(split.encode_ms)} ms a step in all, {number(max(0.0, hidden))} of "
            "them beside training"
        )
    if split.communication_ms:
        lines.append(f"communication: {number(split.communication_ms)} ms a step in all")
    lines += [f"graph break ({count}): {reason}" for reason, count in graphs.breaks.items()]
    lines += [f"compiled again: {reason}" for reason in graphs.recompiled]
    return lines
