"""The proof that fast is also right: one run on the fast path and on plain fp32 torch.

Timestep, noise, crop and every other draw belong to the sample, so both runs see the same numbers
at every step, and their losses can be compared one by one. They part all the same, since a run
doubles small differences again and again; so there is a third, plain torch in the fast path's
precision: the fast path should not be further from fp32 than that is.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longtake.config import RunConfig, dump_yaml
from longtake.ops.kernels import PLAIN
from longtake.training import read_metrics


@dataclass(frozen=True)
class Difference:
    """How far the losses of one run are from those of another, as shares of these."""

    mean: float
    """Of a step, without sign."""
    largest: float
    """Of a single step, without sign."""
    bias: float
    """Mean with sign: positive if the run learns worse."""

    def __str__(self) -> str:
        return f"{self.mean:.2%} on average, {self.largest:.2%} at most, bias {self.bias:+.3%}"


@dataclass(frozen=True)
class Curve:
    """The losses of the runs at the same steps."""

    steps: tuple[int, ...]
    fast: tuple[float, ...]
    plain_same: tuple[float, ...]
    """Plain torch in the precision of the fast path: what precision alone does."""
    plain: tuple[float, ...]
    """Plain torch in fp32."""

    def differences(self, losses: Sequence[float]) -> list[float]:
        """(loss - plain) / plain of each step."""
        return [(loss - p) / p for loss, p in zip(losses, self.plain, strict=True)]

    def difference(self, losses: Sequence[float]) -> Difference:
        """Of these losses from those of plain fp32."""
        differences = self.differences(losses)
        return Difference(
            mean=statistics.fmean(map(abs, differences)),
            largest=max(map(abs, differences)),
            bias=statistics.fmean(differences),
        )


@dataclass(frozen=True)
class CurveReport:
    """A curve and what it is of."""

    environment: dict[str, Any]
    config: dict[str, Any]
    curve: Curve


def plain_torch(config: RunConfig) -> RunConfig:
    """The same run with explicit softmax and unfused norms, eager."""
    parallel = replace(config.parallel, compile=False)
    return replace(config, kernels=PLAIN, parallel=parallel)


def plain_fp32(config: RunConfig) -> RunConfig:
    """`plain_torch` in fp32."""
    plain = plain_torch(config)
    return replace(plain, parallel=replace(plain.parallel, param_dtype="fp32"))


def measure_curve(config: RunConfig, folder: Path, *, steps: int) -> Curve:
    """Train the three runs for so many steps, in `folder`, and read their losses.

    Raises: RuntimeError with the end of its output if a run fails.
    """
    short = replace(
        config,
        output=str(folder),
        train=replace(config.train, steps=steps, log_every_steps=1),
        sampling=replace(config.sampling, every_steps=0, prompts=(), labels=()),
        checkpoint=replace(config.checkpoint, every_steps=steps, keep_last=1),
    )
    runs = {"fast": short, "plain-same": plain_torch(short), "plain": plain_fp32(short)}
    losses = {name: _losses(replace(run, name=name), folder) for name, run in runs.items()}
    common = sorted(set.intersection(*(set(by_step) for by_step in losses.values())))
    fast, same, plain = (tuple(losses[name][step] for step in common) for name in runs)
    return Curve(steps=tuple(common), fast=fast, plain_same=same, plain=plain)


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
        f"| {step} | {fast:.5f} | {same:.5f} | {plain:.5f} |"
        for step, fast, same, plain in zip(
            curve.steps, curve.fast, curve.plain_same, curve.plain, strict=True
        )
        if step == 1 or step % 10 == 0 or step == curve.steps[-1]
    ]
    return "\n".join(
        [
            f"# Fast path against plain fp32, {len(curve.steps)} steps, {device}",
            "",
            "The same samples, timesteps and noise at every step; plain has explicit softmax and "
            "unfused norms, eager. How a step's loss differs from that of plain fp32:",
            "",
            f"- fast path: {curve.difference(curve.fast)}",
            f"- plain in the fast path's precision: {curve.difference(curve.plain_same)}",
            "",
            f"`{' '.join(environment.get('command', []))}`",
            "",
            "![the curves](curve.png)",
            "",
            "| step | fast | plain, same precision | plain fp32 |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def plot_curve(curve: Curve, path: Path) -> None:
    """The losses over steps, and below their relative differences from plain fp32.

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
    below.axhline(0, color="#8fadc4", linewidth=1)
    for losses, colour, label in (
        (curve.plain_same, "#7a848e", "plain, same precision"),
        (curve.fast, "#d0533f", None),
    ):
        percent = [100 * value for value in curve.differences(losses)]
        below.plot(curve.steps, percent, color=colour, linewidth=1, label=label)
    below.legend(frameon=False, fontsize=8)
    below.set_ylabel("difference, %")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
