"""Runs a function in several real processes over gloo, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# Forked from a server that has imported torch and holds nothing else: as clean as a new
# interpreter, without the seconds that each import would take.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.utils.tensorboard",
        "matplotlib.pyplot",
        "longtake.programs.sample",
        "longtake.programs.train",
    ]
)


def run_in_processes(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 60
) -> list[Any]:
    """Calls `function(*args)` in `world_size` processes, one thread each; returns results by rank.

    The function lives at the top of a test module; arguments and results are pickled. It finds
    torchrun's environment and calls `start_distributed` itself, if it wants to.

    Raises: AssertionError with rank and traceback of each process that failed, died or did not
    finish; the others are killed.
    """
    with Processes(function, world_size, *args) as processes:
        return processes.results(timeout_seconds)


class Processes:
    """Processes that run a function, for tests that signal or kill them; see `run_in_processes`."""

    def __init__(self, function: Callable[..., Any], world_size: int, *args: Any) -> None:
        # The store lives here, as with torchrun: its port is free because it is already bound.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world_size):
            here, there = _CONTEXT.Pipe(duplex=False)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            process = _CONTEXT.Process(
                target=_run, args=(there, environment, function, args), daemon=True
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.join(timeout=1)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()

    def signal(self, rank: int, number: int) -> None:
        """Sends a signal to one process."""
        os.kill(self._processes[rank].pid, number)

    def kill(self) -> None:
        """Kills all processes at once, as a power cut would."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def wait_until(self, condition: Callable[[], bool], timeout_seconds: float = 60) -> None:
        """Waits for something that they do; fails if one ends before, or when time is over."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            if not all(process.is_alive() for process in self._processes):
                self.results(1)
            assert time.monotonic() < deadline, f"not so after {timeout_seconds} s"
            time.sleep(0.001)

    def exit_codes(self, timeout_seconds: float = 60) -> list[int | None]:
        """Waits for all to end; None for one that has not."""
        deadline = time.monotonic() + timeout_seconds
        for process in self._processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self._processes]

    def results(self, timeout_seconds: float = 60) -> list[Any]:
        """What the function returned, by rank. Raises as `run_in_processes` does."""
        deadline = time.monotonic() + timeout_seconds
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), timeout=left):
                rank = waiting.pop(pipe)
                try:
                    is_result, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    is_result, value = False, "died without a word"
                (results if is_result else failures)[rank] = value
            if failures:
                # Give the others a moment to fail too: theirs may be the telling error.
                deadline = min(deadline, time.monotonic() + 3)
        if waiting and not failures:
            failures = dict.fromkeys(waiting.values(), f"did not finish in {timeout_seconds} s")
        assert not failures, "\n".join(f"rank {rank}: {text}" for rank, text in failures.items())
        return [results[rank] for rank in range(len(self._pipes))]


def _run(
    pipe: Connection, environment: dict[str, str], function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        outcome = (True, function(*args))
    except Exception:
        outcome = (False, traceback.format_exc())
    # Plain pickle copies tensors; multiprocessing's own would share memory that ends with us.
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()
    if not outcome[0]:
        sys.exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()
