"""`bad_samples.jsonl`: every sample that a run could not read, once, from all processes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longtake.parallel import gather_json

log = logging.getLogger(__name__)


class BadSampleLog:
    """Appends samples with their path and reason; what was noted after step `first_step`, by a run
    that was then resumed from there, is forgotten."""

    def __init__(self, path: Path, *, is_writer: bool, first_step: int = 0) -> None:
        self._path, self._is_writer = path, is_writer
        self._known: set[tuple[str, int]] = set()
        if not is_writer or not path.exists():
            return
        kept = [entry for entry in _read(path) if first_step and entry["step"] <= first_step]
        self._known = {_identity(entry) for entry in kept}
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        os.replace(temporary, path)

    def note(self, step: int, manifest: Path, samples: Sequence[Mapping[str, Any]]) -> int:
        """Writes down those that are new; all processes call it together. Returns how many there
        are in all, right in the process that writes."""
        entries = [{"step": step, "manifest": str(manifest), **sample} for sample in samples]
        gathered = gather_json(entries)
        news = []
        for entry in (entry for part in gathered for entry in part):
            if _identity(entry) not in self._known:
                self._known.add(_identity(entry))
                news.append(entry)
        if self._is_writer and news:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write("".join(map(_line, news)))
            for entry in news:
                log.warning("unreadable: %s: %s", entry["path"], entry["text"])
        return len(self._known)


def _identity(entry: Mapping[str, Any]) -> tuple[str, int]:
    return entry["manifest"], entry["line"]


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last one cut off by a crash is left out."""
    entries = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            entries.append(json.loads(text))
        except ValueError:
            break
    return entries
