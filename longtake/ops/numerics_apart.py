"""The comparisons of `longtake.ops.numerics` in processes of their own.

Nearly all of a check on a GPU is compiling, which processes share; and a kernel that breaks the
device, hangs or kills its process is one failure there, not the end of all checks.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from itertools import groupby
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

import torch

from longtake.ops.numerics import Check, Result, run_check

# A check takes seconds; FlashAttention-4 compiles for half a minute.
START_SECONDS, CHECK_SECONDS = 120.0, 300.0
_Numbered = tuple[int, Check]

logger = logging.getLogger(__name__)


def run_checks_apart(
    checks: Sequence[Check],
    device: torch.device,
    processes: int,
    *,
    check_seconds: float = CHECK_SECONDS,
) -> Generator[Result]:
    """`run_check` of each, in their order, in so many processes beside this one.

    A check whose process dies, whose device breaks or that takes longer than `check_seconds` has
    failed, and a new process goes on with those after it. Where processes cannot have the device,
    as one that is for a single process, the checks run in this one.
    """
    # Those that share a compiled kernel stay together.
    groups = groupby(
        enumerate(checks), key=lambda one: (one[1].operation, one[1].implementation, one[1].dtype)
    )
    waiting = deque(deque(group) for _, group in groups)
    workers = [_Worker(device, check_seconds) for _ in range(min(processes, len(waiting)))]
    results: dict[int, Result] = {}
    try:
        for number in range(len(checks)):
            while number not in results and workers:
                for worker in workers:
                    if not worker.group and waiting:
                        worker.begin(waiting.popleft())
                busy = [worker for worker in workers if worker.group]
                ready = wait([worker.pipe for worker in busy], timeout=0.2)
                for worker in busy:
                    if worker.pipe in ready:
                        results.update(worker.receive())
                    results.update(worker.give_up_if_late())
                for worker in [worker for worker in workers if worker.is_refused]:
                    workers.remove(worker)
                    worker.stop()
                    waiting.appendleft(worker.group)
            yield results.pop(number) if number in results else run_check(checks[number], device)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that runs one check after the other, and another one when that has ended."""

    def __init__(self, device: torch.device, check_seconds: float) -> None:
        self.group: deque[_Numbered] = deque()
        """What it has not done; its process is at work on the first."""
        self.is_refused = False
        """Whether a fresh process could not use the device."""
        self._device, self._check_seconds = device, check_seconds
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")  # a forked process could not use the GPU
        self.pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, self._device), daemon=True)
        self._process.start()
        end.close()  # so that the pipe ends with the process
        self._is_fresh = True
        self._since = time.monotonic()

    def begin(self, group: deque[_Numbered]) -> None:
        self.group = group
        self._send_next()

    def _send_next(self) -> None:
        if self.group and not self._is_fresh:
            self._since = time.monotonic()
            with suppress(OSError):  # if its process has died, `receive` is told as well
                self.pipe.send(self.group[0][1])

    def receive(self) -> dict[int, Result]:
        """What its process says: that it is ready, or a result by number."""
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):
            said = "its process died"
        if self._is_fresh:
            self._is_fresh = False
            if said is None:
                self._send_next()
            else:
                self._refuse(said)
            return {}
        number, check = self.group.popleft()
        if isinstance(said, Result):
            self._send_next()
            return {number: said}
        seconds = time.monotonic() - self._since
        self._start_anew()
        return {number: _failure(check, said, seconds)}

    def give_up_if_late(self) -> dict[int, Result]:
        """A failure by number if its check, or its process's start, takes too long."""
        seconds = time.monotonic() - self._since
        if not self.group or seconds < (START_SECONDS if self._is_fresh else self._check_seconds):
            return {}
        if self._is_fresh:
            self._refuse(f"it did not start within {seconds:.0f} s")
            return {}
        number, check = self.group.popleft()
        self._start_anew()
        return {number: _failure(check, f"it did not end within {seconds:.0f} s", seconds)}

    def _refuse(self, reason: str) -> None:
        logger.warning("A process for checks cannot use %s: %s", self._device, reason)
        self.is_refused = True

    def _start_anew(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _failure(check: Check, detail: str, seconds: float) -> Result:
    return Result(
        check=check,
        passed=False,
        error=float("nan"),
        allowed=0.0,
        detail=detail,
        seconds=seconds,
    )


def _serve(pipe: Connection, device: torch.device) -> None:
    """Says None when the device can be used, else why not; then runs what it is sent until the
    other end has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end stops this process
    try:
        torch.ones((), device=device)
    except Exception as error:  # a device may fail in any way: that is what is asked
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)
    try:
        while True:
            pipe.send(_answer(pipe.recv(), device))
    except (EOFError, BrokenPipeError):
        return


def _answer(check: Check, device: torch.device) -> Result | str:
    try:
        result = run_check(check, device)
    except RuntimeError as error:
        return str(error)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the other processes need memory, too
    return result
