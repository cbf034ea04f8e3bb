"""What torch.compile has done in this process: graphs, breaks, and why it compiled again."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """Counts since the process began."""

    compiled: int
    breaks: dict[str, int]
    """How often tracing gave up and went back to Python, by reason."""
    recompiled: tuple[str, ...]
    """Why a function that had a graph got another, each reason once."""


def count_graphs() -> int:
    """Graphs compiled so far; nothing is imported for it."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def describe_graphs() -> Graphs:
    """Graphs, breaks and the reasons of recompilation so far."""
    if "torch._dynamo" not in sys.modules:
        return Graphs(compiled=0, breaks={}, recompiled=())
    from torch._dynamo.utils import counters, get_compilation_metrics

    reasons = [
        _guards(str(entry.recompile_reason))
        for entry in get_compilation_metrics()
        if entry.recompile_reason
    ]
    return Graphs(
        compiled=count_graphs(),
        breaks={str(reason): int(count) for reason, count in counters["graph_break"].items()},
        recompiled=tuple(dict.fromkeys(reasons)),
    )


def _guards(reason: str) -> str:
    """The guards that failed, without their places in the code and the stacks under them."""
    guards = [
        line.split("  # ")[0].strip(" -")
        for line in reason.splitlines()
        if re.match(r"[\s-]*\d+/\d+: ", line)
    ]
    return "; ".join(guards) or " ".join(reason.split())
