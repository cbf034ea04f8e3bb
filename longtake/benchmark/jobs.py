"""A measurement in a process of its own: clean memory, and no row can take another one with it."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

from longtake.benchmark.measure import Say, StepOptions
from longtake.benchmark.records import MachineReport, Outcome, StepReport, load_report
from longtake.config import RunConfig, dump_yaml, to_plain

# The exit status of a step that the device's memory cannot hold.
DOES_NOT_FIT = 3


@dataclass(frozen=True)
class Job:
    """One step to be timed."""

    config: RunConfig
    options: StepOptions


@dataclass(frozen=True)
class Finished:
    """What came of a job."""

    outcome: Outcome
    does_not_fit: bool = False
    """Memory was the reason for failure, so that something smaller may work."""


RunJob = Callable[[Job], Finished]


def ask_machine(*, say: Say, timeout_seconds: float = 300) -> MachineReport:
    """`longtake bench ceilings` in a new interpreter: this one keeps off the device, whose memory
    belongs to the rows.

    Raises: RuntimeError if that fails: no row would fare better.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "machine.json"
        command = [*_bench(), "ceilings", "--json", str(result)]
        status, tail = _run(command, say, timeout_seconds)
        if not result.exists():
            raise RuntimeError(
                f"measuring the device's ceilings: {_ended(status, timeout_seconds)}: {tail}"
            )
        return load_report(result, MachineReport)


def run_in_process(job: Job, *, say: Say, timeout_seconds: float) -> Finished:
    """`longtake bench step` in a new interpreter, whose output is passed on line by line."""
    with tempfile.TemporaryDirectory() as folder:
        config, result = Path(folder) / "config.yaml", Path(folder) / "step.json"
        config.write_text(dump_yaml(job.config), encoding="utf-8")
        command = [
            *(*_bench(), "step", "--config", str(config), "--json", str(result)),
            *("--no-ceilings", "--brief", *_arguments(job.options)),
        ]
        status, tail = _run(command, say, timeout_seconds)
        report = load_report(result, StepReport) if result.exists() else None
    plain = to_plain(job.config)
    if report is not None and report.measurement is not None:
        return Finished(Outcome(config=plain, measurement=report.measurement))
    failure = report.failure if report is not None else None
    failure = failure or f"{_ended(status, timeout_seconds)}: {tail or 'it said nothing'}"
    return Finished(Outcome(config=plain, failure=failure), does_not_fit=status == DOES_NOT_FIT)


def _bench() -> tuple[str, ...]:
    return sys.executable, "-m", "longtake", "bench"


def _arguments(options: StepOptions) -> list[str]:
    """The options as `longtake bench step` takes them."""
    protocol = options.protocol
    arguments = ["--encoders", options.encoders, "--bucket", str(options.bucket)]
    arguments += ["--warmup", str(protocol.warmup), "--steps", str(protocol.steps)]
    arguments += ["--seconds", str(protocol.seconds), "--seed", str(protocol.seed)]
    arguments += ["--sizing", options.sizing]
    if options.micro_batch is not None:
        arguments += ["--micro-batch", str(options.micro_batch)]
    return arguments


def _run(command: Sequence[str], say: Say, timeout_seconds: float) -> tuple[int, str]:
    """Exit status and the last line of output; everything is passed on while it comes."""
    last: deque[str] = deque(maxlen=1)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        timer = Timer(timeout_seconds, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line := line.rstrip():
                    last.append(line)
                    say(line)
            status = process.wait()
        finally:
            # A table that is interrupted takes its row along.
            process.kill()
            timer.cancel()
    return status, last[0] if last else ""


def _ended(status: int, timeout_seconds: float) -> str:
    if status == -signal.SIGKILL:
        return (
            f"the process was killed, by the system for want of host memory or after "
            f"{timeout_seconds:.0f} s"
        )
    if status < 0:
        return f"the process died of {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


def stopwatch(say: Say) -> Say:
    """Says every line with the time since now."""
    start = time.monotonic()
    return lambda text: say(f"[{time.monotonic() - start:7.1f} s] {text}")
