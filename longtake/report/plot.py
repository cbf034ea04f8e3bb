"""The loss plot of a run, from its metrics file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Transparent, and in colours that read on white as on black.
_TEXT, _PALE, _STRONG = "#7a848e", "#8fadc4", "#d0533f"


def series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was logged with a finite value."""
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float))]
    return [step for step, _ in points], [value for _, value in points]


def plot_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Draw training and held-out loss against the step, as PNG.

    Raises: ImportError with the install command when matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "drawing the loss plot needs matplotlib: pip install 'longtake[train]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), dpi=160)
    steps, values = series(records, "train/loss")
    axes.plot(steps, values, color=_PALE, linewidth=1.2, label="training (random timesteps)")
    steps, values = series(records, "validation/loss")
    if steps:
        axes.plot(
            steps,
            values,
            color=_STRONG,
            linewidth=2,
            marker="o",
            markersize=3.5,
            label="held-out (fixed timesteps and noise)",
        )
    axes.set_xlabel("step", color=_TEXT)
    axes.set_ylabel("loss", color=_TEXT)
    axes.set_ylim(bottom=0)
    axes.tick_params(colors=_TEXT)
    axes.grid(color=_TEXT, alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_TEXT)
    if records:
        axes.legend(frameon=False, labelcolor=_TEXT)
    figure.tight_layout()
    figure.savefig(path, transparent=True)
    pyplot.close(figure)
