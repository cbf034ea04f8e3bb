"""The proof that fast is also right: one run twice, on the fast path and on plain fp32 torch.

Timestep, noise, crop and every other draw belong to the sample, so the two runs see the same
numbers at every step, and their losses can be compared one by one.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longtake.config import RunConfig, dump_yaml
from longtake.ops.kernels import PLAIN
from longtake.training import read_metrics


@dataclass(frozen=True)
class Curve:
    """The losses of both runs at the same steps, and how far they are apart."""

    steps: tuple[int, ...]
    fast: tuple[float, ...]
    plain: tuple[float, ...]

    @property
    def mean_difference(self) -> float:
        """Mean of |fast - plain| / plain."""
        return statistics.fmean(abs(f - p) / p for f, p in zip(self.fast, self.plain, strict=True))

    @property
    def largest_difference(self) -> float:
        """Largest |fast - plain| / plain of a single step."""
        return max(abs(f - p) / p for f, p in zip(self.fast, self.plain, strict=True))

    @property
    def bias(self) -> float:
        """Mean of (fast - plain) / plain: positive if the fast path learns worse."""
        return statistics.fmean((f - p) / p for f, p in zip(self.fast, self.plain, strict=True))


@dataclass(frozen=True)
class CurveReport:
    """A curve and what it is of."""

    environment: dict[str, Any]
    config: dict[str, Any]
    curve: Curve


def plain_fp32(config: RunConfig) -> RunConfig:
    """The same run in fp32 with explicit softmax and unfused norms, eager."""
    parallel = replace(config.parallel, compile=False, param_dtype="fp32")
    return replace(config, kernels=PLAIN, parallel=parallel)


def measure_curve(config: RunConfig, folder: Path, *, steps: int) -> Curve:
    """Train both runs for so many steps, in `folder`, and read their losses.

    Raises: RuntimeError with the end of its output if a run fails.
    """
    short = replace(
        config,
        output=str(folder),
        train=replace(config.train, steps=steps, log_every_steps=1),
        sampling=replace(config.sampling, every_steps=0, prompts=(), labels=()),
        checkpoint=replace(config.checkpoint, every_steps=steps, keep_last=1),
    )
    losses = {}
    for name, run in (("fast", short), ("plain", plain_fp32(short))):
        losses[name] = _losses(replace(run, name=name), folder)
    common = sorted(losses["fast"].keys() & losses["plain"].keys())
    return Curve(
        steps=tuple(common),
        fast=tuple(losses["fast"][step] for step in common),
        plain=tuple(losses["plain"][step] for step in common),
    )


def _losses(config: RunConfig, folder: Path) -> dict[int, float]:
    """The training loss by step of a run in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{config.name}.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    command = [sys.executable, "-m", "longtake", "train", "--config", str(file), "--fresh"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"the {config.name} run ended with status {done.returncode}:\n{tail}")
    lines = read_metrics(folder / config.name)
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def curve_markdown(report: CurveReport) -> str:
    """A page for docs/benchmarks: what was run, how far apart, and every tenth loss."""
    curve, environment = report.curve, report.environment
    device = environment.get("device", {}).get("name", "CPU")
    rows = [
        f"| {step} | {fast:.5f} | {plain:.5f} |"
        for step, fast, plain in zip(curve.steps, curve.fast, curve.plain, strict=True)
        if step == 1 or step % 10 == 0 or step == curve.steps[-1]
    ]
    return "\n".join(
        [
            f"# Fast path against plain fp32, {len(curve.steps)} steps, {device}",
            "",
            "The same samples, timesteps and noise at every step; plain is fp32 with explicit "
            "softmax and unfused norms, eager.",
            "",
            f"- mean difference of a step's loss: {curve.mean_difference:.2%}",
            f"- largest: {curve.largest_difference:.2%}",
            f"- bias (fast above plain): {curve.bias:+.3%}",
            "",
            f"`{' '.join(environment.get('command', []))}`",
            "",
            "![both curves](curve.png)",
            "",
            "| step | fast | plain fp32 |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def plot_curve(curve: Curve, path: Path) -> None:
    """Both losses over steps, and their relative difference below.

    Raises: ImportError with the install command when matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'longtake[train]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, sharex=True, figsize=(8, 5), dpi=160, height_ratios=(3, 1)
    )
    above.plot(curve.steps, curve.plain, color="#8fadc4", linewidth=2.2, label="plain fp32")
    above.plot(curve.steps, curve.fast, color="#d0533f", linewidth=1, label="fast path")
    above.set_ylabel("training loss")
    above.legend(frameon=False)
    difference = [(f - p) / p for f, p in zip(curve.fast, curve.plain, strict=True)]
    below.axhline(0, color="#8fadc4", linewidth=1)
    below.plot(curve.steps, [100 * value for value in difference], color="#d0533f", linewidth=1)
    below.set_ylabel("difference, %")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
