"""Files of one JSON object a line, as a run appends to them: readable after a crash at any byte."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last one cut off by a crash, in mid-character even, is left out."""
    lines = []
    # Not splitlines: it also splits at separators that JSON strings may hold.
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def replace_json_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes the file anew with these lines; it holds the old ones or the new, nothing between."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(map(json_line, lines)), encoding="utf-8")
    os.replace(temporary, path)


def json_line(value: dict[str, Any]) -> str:
    """One line; NaN and infinity, for which JSON has no word, are a ValueError."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
