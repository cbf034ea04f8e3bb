"""A run that hangs ends by itself: every process prints where it stands and the job fails, so that
whoever started it (torchrun, a batch system) can start it again from its last checkpoint.

Three things watch, so that each covers what the others cannot see:

- a thread with the deadline: no forward, step or save has begun for `timeout_seconds`;
- a thread that tells the others it is alive and hears when one of them has given up. It keeps to
  itself, because the store that they talk through may hang as well;
- `faulthandler`'s own timer, for a process whose threads cannot run at all.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import _get_default_store

from longtake.parallel import COLLECTIVE_MARGIN_SECONDS

log = logging.getLogger(__name__)

# How long a process may be silent until it does not count as alive, in signs of life.
_SILENT_BEATS = 3
# The rest of the time that collectives allow is for this conversation.
_ASKING_SECONDS = COLLECTIVE_MARGIN_SECONDS / 3

_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Connection refused",
    "Timed out waiting",
    "NCCL",
)
_ADVICE = (
    "Checkpoints that were finished are complete: the same command goes on from the last one "
    "(`torchrun --max-restarts` gives it by itself)"
)


def _beat_seconds(world_size: int) -> float:
    """How often a process gives a sign of life."""
    # A thousand a second would be work for the one store that there is; but who waits for them must
    # hear some before it gives the store up.
    return min(max(1.0, world_size / 256), _ASKING_SECONDS / (2 * _SILENT_BEATS))


class Watchdog:
    """Gives the run up when nothing moves for `timeout_seconds`. All processes make one, after
    `start_distributed`; the first `progressed` starts the clock.

    A context: leaving it ends the watch, and says what a broken connection to another process
    means.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._own_name = f"rank {self._rank} ({socket.gethostname()}, process {os.getpid()})"
        self._beat_seconds = _beat_seconds(self._world_size)
        self._last: tuple[float, str] | None = None
        self._closed = threading.Event()
        self._giving_up = threading.Lock()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        if self._world_size > 1:
            threading.Thread(target=self._beat, name="signs of life", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST):
            log.error(
                "%s has lost another process, or waited too long for it; the first one that "
                "failed says why, or torchrun which signal ended it. %s",
                self._own_name,
                _ADVICE,
            )

    def progressed(self, what: str) -> None:
        """Says that `what` begins now; it and all up to the next call may take the whole time."""
        self._last = (time.monotonic(), what)
        if sys.__stderr__ is not None:
            later = self._timeout + COLLECTIVE_MARGIN_SECONDS
            faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__)

    def watch(self, model: nn.Module) -> None:
        """Counts every forward of the model as progress: in training, validation and sampling."""
        model.register_forward_pre_hook(lambda *_: self.progressed("a forward"))

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout / 10)):
            since, what = self._last or (time.monotonic(), "")
            if (waited := time.monotonic() - since) > self._timeout:
                self._give_up(
                    f"nothing has moved for {waited:.0f} s since {what} began, and "
                    f"parallel.timeout_seconds={self._timeout:g}: given up as hung",
                    ask=True,
                )

    def _give_up(self, reason: str, *, ask: bool) -> None:
        """Prints, tells the others, and ends this process at once: whatever it waits for may never
        come."""
        with self._giving_up:
            if self._closed.is_set():
                return
            _say(f"{self._own_name}: {reason}. Where its threads are:")
            if sys.__stderr__ is not None:
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            if ask and self._world_size > 1:
                _say(f"{self._own_name}: {self._who_is_silent(reason)}")
            if ask:
                _say(f"{_ADVICE}. If this honestly takes longer, raise parallel.timeout_seconds")
            os._exit(1)

    def _who_is_silent(self, reason: str) -> str:
        """Raises the alarm and says who does not hear it; not longer than `_ASKING_SECONDS`."""
        found: list[list[str]] = []

        def ask() -> None:
            store = self._open_store()
            store.set("alarm", f"{self._own_name} says: {reason}")
            before = _beats(store, self._world_size)
            time.sleep(_SILENT_BEATS * self._beat_seconds)
            after = _beats(store, self._world_size)
            found.append(
                [
                    store.get(f"name/{rank}").decode() if before[rank] else f"rank {rank}"
                    for rank in range(self._world_size)
                    # Who has heard the alarm counts as alive, though it has ended by now.
                    if before[rank] == after[rank] and not store.check([f"heard/{rank}"])
                    if rank != self._rank
                ]
            )

        _try_for(_ASKING_SECONDS, ask)
        if not found:
            return "the store on the first machine does not answer: that machine may be lost"
        if found[0]:
            return f"no sign of life from {', '.join(found[0])}: stopped, or its machine is lost"
        return "all processes are alive: the one that stands elsewhere than the rest is the cause"

    def _beat(self) -> None:
        try:
            store = self._open_store()
            store.set(f"name/{self._rank}", self._own_name)
            # One at once: whoever has given none goes by its number, not by its name.
            store.add(f"beat/{self._rank}", 1)
            while not self._closed.wait(self._beat_seconds):
                store.add(f"beat/{self._rank}", 1)
                if store.check(["alarm"]):
                    store.set(f"heard/{self._rank}", "")
                    self._give_up(store.get("alarm").decode(), ask=False)
        except RuntimeError:
            # The store is gone, with the process that held it: collectives will notice.
            return

    def _open_store(self) -> Store:
        """A connection of its own: on a shared one, calls would wait for the training's."""
        store: Any = _get_default_store()
        store = store.clone()  # not in PyTorch's own type stubs
        store.set_timeout(timedelta(seconds=_ASKING_SECONDS))
        return PrefixStore("longtake/watchdog", store)


def _beats(store: Store, world_size: int) -> list[int]:
    return [store.add(f"beat/{rank}", 0) for rank in range(world_size)]


def _try_for(seconds: float, function: Callable[[], None]) -> None:
    """Runs a function in a thread and leaves it alone after so many seconds."""

    def run() -> None:
        try:
            function()
        except RuntimeError as error:
            _say(f"the other processes cannot be asked: {error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)


def _say(text: str) -> None:
    """To the real stderr, at once: logging may be what hangs."""
    if sys.__stderr__ is not None:
        print(text, file=sys.__stderr__, flush=True)
