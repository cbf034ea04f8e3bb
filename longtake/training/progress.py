"""What a person watching sees: a live bar on a terminal, a line per report in a log file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from longtake.training.throughput import Throughput


class _ConsoleHandler(logging.Handler):
    """Log records as lines above the bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_log(*, is_first: bool) -> None:
    """Shows what Longtake logs: on the first process everything, on the others only errors."""
    logger = logging.getLogger("longtake")
    logger.setLevel(logging.INFO if is_first else logging.ERROR)
    if not logger.handlers:
        handler = _ConsoleHandler(Console(stderr=True))
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)


class ProgressBar:
    """Steps done, loss, speed and time left. Silent on all processes but the first."""

    def __init__(self, total_steps: int, *, done: int, is_shown: bool) -> None:
        self._console = Console(quiet=not is_shown)
        self._is_live = is_shown and self._console.is_terminal
        self._total = total_steps
        self._bar = Progress(
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            # On a narrow terminal it is the bar that gives way, then the end of the report.
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=2)),
            TextColumn(
                "{task.fields[report]}", table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            console=self._console,
            disable=not self._is_live,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=done, report="")

    @contextmanager
    def shown(self) -> Iterator[ProgressBar]:
        """Live between entering and leaving."""
        with self._bar:
            yield self

    def advance(self) -> None:
        """One more step was issued."""
        self._bar.advance(self._task)

    def report(self, step: int, speed: Throughput, line: dict[str, Any] | None) -> None:
        """Show the newest numbers that have arrived from the device."""
        parts = []
        if line is not None and line.get("train/loss") is not None:
            parts.append(f"loss {line['train/loss']:.4f}")
        parts.append(f"{speed.samples_per_second:,.1f} samples/s")
        parts.append(f"{speed.tokens_per_second:,.0f} tokens/s")
        if speed.mfu is not None:
            parts.append(f"MFU {speed.mfu:.1%}")
        parts.append(f"{clock(speed.seconds_left)} left")
        text = " · ".join(parts)
        self._bar.update(self._task, report=text)
        if not self._is_live:
            self.say(f"step {step}/{self._total} · {text}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """A time as hours, minutes and seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
