"""What happened to every key of a file and every tensor of a model when the two met."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from longtake.weights.read import WeightsError


class Status(StrEnum):
    """The fate of one key. The last three make a load fail."""

    LOADED = "loaded"
    RENAMED = "renamed"
    RESHAPED = "reshaped"
    REBUILT = "rebuilt buffer"  # in the file, but computed by our models for each shape
    NEW = "new"  # in the model only, and rightly so: the reason says why
    MISSING = "missing"
    UNEXPECTED = "unexpected"
    MISMATCHED = "mismatched"  # the shape or the kind of number does not fit


FAILURES = (Status.MISSING, Status.UNEXPECTED, Status.MISMATCHED)


@dataclass(frozen=True)
class Entry:
    """One line of the account."""

    status: Status
    target: str | None  # key in the model; None if it has no place there
    sources: tuple[str, ...] = ()  # keys in the file
    reason: str = ""
    dtype: str = ""  # "float16" or, when it changed, "float16 -> float32"


@dataclass(frozen=True)
class Account:
    """Every key of a file and of a model, each with what became of it and why."""

    layout: str
    entries: tuple[Entry, ...]
    warnings: tuple[str, ...] = ()

    @property
    def failures(self) -> list[Entry]:
        """The entries that make a strict load fail."""
        return [entry for entry in self.entries if entry.status in FAILURES]

    def counts(self) -> dict[str, int]:
        """How many entries have each status, in the order of `Status`."""
        found = Counter(entry.status for entry in self.entries)
        return {status.value: found[status] for status in Status if found[status]}

    def summary(self) -> str:
        """One line: the layout and the counts."""
        counts = ", ".join(f"{number} {status}" for status, number in self.counts().items())
        return f"layout {self.layout}: {counts}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "layout": self.layout,
            "counts": self.counts(),
            "warnings": list(self.warnings),
            "entries": [
                {
                    "status": entry.status.value,
                    "target": entry.target,
                    "sources": list(entry.sources),
                    "reason": entry.reason,
                    "dtype": entry.dtype,
                }
                for entry in self.entries
            ],
        }

    def to_json(self) -> str:
        """The whole account as indented JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def __rich__(self) -> Group:
        """A table in which the blocks of a model share a row."""
        table = Table(title=self.summary(), title_justify="left", expand=False)
        for column in ("what", "count", "model", "file", "dtype", "why"):
            table.add_column(column, justify="right" if column == "count" else "left")
        for row, count in _grouped(self.entries).items():
            style = "red" if row.status in FAILURES else None
            sources = ", ".join(row.sources) if row.sources != (row.target,) else ""
            cells = (row.status.value, str(count), row.target or "", sources, row.dtype, row.reason)
            table.add_row(*map(Text, cells), style=style)
        return Group(table, *(Text(f"warning: {warning}", "yellow") for warning in self.warnings))

    def __str__(self) -> str:
        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


class LoadError(WeightsError):
    """A strict load found keys that do not belong together; nothing was written into the model."""

    def __init__(self, account: Account) -> None:
        self.account = account
        rows = _grouped(account.failures)
        lines = [f"the weights do not fit the model ({account.summary()})"]
        for row, count in list(rows.items())[:12]:
            keys = row.target or ", ".join(row.sources)
            times = f" ({count} of them)" if count > 1 else ""
            lines.append(f"  {row.status}: {keys}{times}{': ' if row.reason else ''}{row.reason}")
        if len(rows) > 12:
            lines.append(f"  and {len(rows) - 12} more kinds of key")
        super().__init__("\n".join(lines))


def _grouped(entries: list[Entry] | tuple[Entry, ...]) -> Counter[Entry]:
    """Entries that differ by the number of their block only, counted together."""
    return Counter(
        Entry(
            entry.status,
            None if entry.target is None else _pattern(entry.target),
            tuple(dict.fromkeys(map(_pattern, entry.sources))),
            _pattern(entry.reason),
            entry.dtype,
        )
        for entry in entries
    )


def _pattern(text: str) -> str:
    return re.sub(r"(blocks)\.\d+\.", r"\1.*.", text)
