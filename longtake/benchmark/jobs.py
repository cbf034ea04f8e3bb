"""A measurement in processes of its own, one a GPU: clean memory, and no row can take another one
with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from longtake.benchmark.measure import Say, StepOptions
from longtake.benchmark.records import MachineReport, Outcome, StepReport, load_report
from longtake.config import RunConfig, dump_yaml, to_plain

# When one process of several fails, the others may wait for it in vain.
_GRACE_SECONDS = 10

# The exit status of a step that the device's memory cannot hold.
DOES_NOT_FIT = 3


@dataclass(frozen=True)
class Job:
    """One step to be timed."""

    config: RunConfig
    options: StepOptions
    num_processes: int = 1


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
    """`longtake bench step` in new interpreters, whose output is passed on line by line."""
    with tempfile.TemporaryDirectory() as folder:
        config, result = Path(folder) / "config.yaml", Path(folder) / "step.json"
        config.write_text(dump_yaml(job.config), encoding="utf-8")
        command = [
            *(*_bench(), "step", "--config", str(config), "--json", str(result)),
            *("--no-ceilings", "--brief", *_arguments(job.options)),
        ]
        status, tail = _run(command, say, timeout_seconds, job.num_processes)
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


def _run(
    command: Sequence[str], say: Say, timeout_seconds: float, num_processes: int = 1
) -> tuple[int, str]:
    """Exit status and the last line of output; everything is passed on while it comes.

    Of several processes it is the first status that is not 0, and all end with that one.
    """
    last: deque[str] = deque(maxlen=1)
    reading, writing = os.pipe()
    # As torchrun does it, whose own processes would outlive a table that is interrupted.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    try:
        for rank in range(num_processes):
            place = {} if num_processes == 1 else _place(rank, num_processes, store.port)
            processes.append(
                subprocess.Popen(
                    command, stdout=writing, stderr=subprocess.STDOUT, env=os.environ | place
                )
            )
        os.close(writing)
        reader = Thread(target=_pass_on, args=(reading, say, last), daemon=True)
        reader.start()
        status = _wait(processes, timeout_seconds)
    finally:
        # A table that is interrupted takes its row along.
        for process in processes:
            process.kill()
            process.wait()
    # Not for ever: a helper process of theirs may still hold the pipe.
    reader.join(_GRACE_SECONDS)
    return status, last[0] if last else ""


def _place(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a process of several finds in its environment."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _pass_on(reading: int, say: Say, last: deque[str]) -> None:
    with open(reading, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line := line.rstrip():
                last.append(line)
                say(line)


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout_seconds: float) -> int:
    """The first exit status that is not 0, or 0; when time is over the processes are killed."""
    deadline, failed = time.monotonic() + timeout_seconds, 0
    while None in (statuses := [process.poll() for process in processes]):
        if not failed and any(statuses):
            failed = next(filter(None, statuses))
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return failed or next(filter(None, statuses), 0)


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
