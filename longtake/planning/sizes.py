"""Sizes on a disk as people write them: 2TB, 1.5TiB, and back."""

from __future__ import annotations

import re

_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB")
_UNITS = {unit: 1000**power for power, unit in enumerate(_DECIMAL)}
_UNITS |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGTP", start=1)}
_UNITS["KB"] = 1000  # kB as most people write it
_SIZE = re.compile(r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?) ?([A-Za-z]*)")


def parse_size(text: str, *, name: str = "size") -> int:
    """Bytes of a size such as 500GB (thousands) or 1.5TiB (1024s).

    Raises:
        ValueError: `name` says whose value is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{name}={text!r:.60} is not a size: give a number and a unit, such as 500GB, 2TB or "
            "1.5TiB"
        )
    number, unit = match.groups()
    if unit not in _UNITS:
        near = {known.lower(): known for known in _UNITS}.get(f"{unit.lower().rstrip('b')}b")
        if unit:
            problem = f"has the unit {unit!r:.20}, which is none"
        else:
            problem, near = "has no unit", "GB"
        hint = f": did you mean {number}{near}?" if near else ""
        raise ValueError(f"{name}={text!r:.60} {problem}{hint} (units: {', '.join(_UNITS)})")
    size = round(float(number) * _UNITS[unit]) if "." in number else int(number) * _UNITS[unit]
    if size < 1:
        raise ValueError(f"{name}={text!r:.60} must be more than nothing")
    return size


def size_text(num_bytes: float) -> str:
    """Bytes in the largest unit of thousands that leaves a number above 1: 51.8 TB."""
    value, unit = float(num_bytes), 0
    # What would be printed as 1,000.0 belongs to the next unit.
    while abs(value) >= 999.95 and unit < len(_DECIMAL) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:,.0f} bytes" if unit == 0 else f"{value:,.1f} {_DECIMAL[unit]}"
