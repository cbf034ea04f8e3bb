"""Stopping on a signal: note it, agree on it at a step boundary, save, leave with a code of its
own."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType

from longtake.parallel import any_process

log = logging.getLogger(__name__)

STOPPED_EXIT_CODE = 75
"""What a run exits with that was asked to stop and has saved: start it again to go on
(EX_TEMPFAIL)."""

# A terminal sends SIGINT to all processes and torchrun passes it on a moment later: not a second
# request.
_SAME_REQUEST_SECONDS = 2.0


class StopRequest:
    """Listens for SIGTERM, SIGINT and SIGUSR1 from now on. The first asks to stop; a later one ends
    at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._time = 0.0
        self._pid = os.getpid()
        assert threading.current_thread() is threading.main_thread(), "signals need the main thread"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def agreed(self) -> bool:
        """Whether any process was asked to stop: the same answer on all, which must all ask at this
        point."""
        stop = any_process(self.signal_name is not None)
        if stop:
            log.warning("stopping: %s", self.signal_name or "a signal to another process")
        return stop

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked worker inherits this: SIGTERM ends it, the rest is its parent's business.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        now = time.monotonic()
        if self.signal_name is None:
            self.signal_name, self._time = signal.Signals(number).name, now
        elif now - self._time > _SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
