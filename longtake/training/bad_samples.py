"""`bad_samples.jsonl`: every sample that a run could not read, once, from all processes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longtake.parallel import gather_json
from longtake.training.json_lines import json_line, read_json_lines, replace_json_lines

log = logging.getLogger(__name__)


class BadSampleLog:
    """Appends samples with their path and reason; what was noted after step `first_step`, by a run
    that was then resumed from there, is forgotten."""

    def __init__(self, path: Path, *, is_writer: bool, first_step: int = 0) -> None:
        self._path, self._is_writer = path, is_writer
        self._known: set[tuple[str, int]] = set()
        if not is_writer or not path.exists():
            return
        lines = read_json_lines(path)
        kept = [entry for entry in lines if first_step and entry["step"] <= first_step]
        self._known = {_identity(entry) for entry in kept}
        replace_json_lines(path, kept)

    def note(self, step: int, manifest: Path, samples: Sequence[Mapping[str, Any]]) -> int:
        """Writes down those that are new; all processes call it together. Returns how many there
        are in all, right in the process that writes."""
        entries = [{"step": step, "manifest": str(manifest), **sample} for sample in samples]
        # Only what this process has not heard of travels: the list of a long run may be long.
        gathered = gather_json([entry for entry in entries if _identity(entry) not in self._known])
        news = []
        for entry in (entry for part in gathered for entry in part):
            if _identity(entry) not in self._known:
                self._known.add(_identity(entry))
                news.append(entry)
        if self._is_writer and news:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write("".join(map(json_line, news)))
            for entry in news:
                log.warning("unreadable: %s: %s", entry["path"], entry["text"])
        return len(self._known)


def _identity(entry: Mapping[str, Any]) -> tuple[str, int]:
    return entry["manifest"], entry["line"]
