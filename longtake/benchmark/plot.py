"""A table as a picture: each row's bars as shares of its floor, or of the best of its kind."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from longtake.benchmark.records import RowReport, TableReport
from longtake.benchmark.render import headline, number

# In colours that read on white as on black.
_TEXT, _PALE, _MIDDLE, _STRONG = "#7a848e", "#b9c9d6", "#8fadc4", "#d0533f"
_HEIGHT = 0.26
# Of a figure's letter, and between a figure and what it stands behind, of the width of all.
_LETTER, _GAP = 0.0095, 0.007


def plot_table(report: TableReport, path: Path) -> None:
    """Draw every measured row: Longtake, plain torch, best elsewhere, and the floor as a mark.

    Rows differ by a factor of thousands in samples per second, so each is drawn relative to its
    floor; one without a floor relative to the fastest of those that share its baseline.

    Raises: ImportError with the install command when matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "drawing the benchmark needs matplotlib: pip install 'longtake[train]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report.rows if row.fast.measurement is not None]
    figure, axes = pyplot.subplots(
        figsize=(9, 1.6 + 0.95 * max(1, len(rows))), dpi=160, layout="constrained"
    )
    labelled: set[str] = set()
    units = _units(rows)
    lengths = [value / units[row.key] for row in rows for _, value, _ in _bars(row)]
    width = 1.3 * max((1.0, *lengths))  # room for the figures
    for place, row in enumerate(rows):
        unit = units[row.key]
        bars = _bars(row)
        for slot, (label, value, colour) in enumerate(bars):
            middle = place + (slot - (len(bars) - 1) / 2) * _HEIGHT
            axes.barh(
                middle,
                value / unit,
                height=_HEIGHT,
                color=colour,
                label=label if label not in labelled else None,
            )
            labelled.add(label)
            figure_text = f"{number(value)} samples/s"
            axes.text(
                _figure_place(row, value / unit, len(figure_text), width),
                middle,
                figure_text,
                va="center",
                fontsize=7,
                color=_TEXT,
            )
        if row.floor_samples_per_second is not None:
            bottom, top = place - 1.6 * _HEIGHT, place + 1.6 * _HEIGHT
            label = "floor by arithmetic" if "floor" not in labelled else None
            axes.plot([1, 1], [bottom, top], color=_TEXT, linewidth=2, label=label)
            labelled.add("floor")
    axes.set_yticks(range(len(rows)), [textwrap.fill(row.title, 44) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    axes.set_xlim(0, width)
    have_floors = {row.floor_samples_per_second is not None for row in rows}
    names = {True: "the row's floor", False: "the fastest of its kind"}
    unit_name = " or, without one, to ".join(names[has] for has in names if has in have_floors)
    axes.set_xlabel(f"samples/s, relative to {unit_name}", color=_TEXT)
    figure.suptitle(headline(report), color=_TEXT, fontsize=10)
    axes.tick_params(colors=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_TEXT)
    if rows:
        figure.legend(
            frameon=False, labelcolor=_TEXT, fontsize=8, loc="outside lower center", ncols=4
        )
    figure.savefig(path, transparent=True)
    pyplot.close(figure)


def _figure_place(row: RowReport, end: float, num_letters: int, width: float) -> float:
    """Where a bar's figure begins: behind its end, or behind the floor's mark if it would cross
    that."""
    start, letters = end + _GAP * width, num_letters * _LETTER * width
    has_mark = row.floor_samples_per_second is not None
    return 1 + _GAP * width if has_mark and start < 1 < start + letters else start


def _units(rows: Sequence[RowReport]) -> dict[str, float]:
    """What is drawn as 1, by the row's key."""
    units, fastest = {}, {}
    for row in rows:
        assert row.fast.measurement is not None
        units[row.key] = row.floor_samples_per_second
        if units[row.key] is None:
            kind = row.baseline or row.key
            speed = row.fast.measurement.samples_per_second
            fastest[kind] = max(fastest.get(kind, 0.0), speed)
    return {row.key: units[row.key] or fastest[row.baseline or row.key] for row in rows}


def _bars(row: RowReport) -> list[tuple[str, float, str]]:
    fast, plain = row.fast.measurement, row.plain and row.plain.measurement
    known = max((figure.samples_per_second for figure in row.known), default=None)
    bars = [
        ("Longtake", fast and fast.samples_per_second, _STRONG),
        ("best elsewhere (H200)", known, _MIDDLE),
        ("plain torch, this run", plain and plain.samples_per_second, _PALE),
    ]
    return [(label, value, colour) for label, value, colour in bars if value is not None]
