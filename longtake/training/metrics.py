"""Where a run's numbers go: JSON lines always, TensorBoard by default, W&B when asked."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.training.json_lines import json_line, read_json_lines, replace_json_lines


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Which logs are written beside `metrics.jsonl`."""

    tensorboard: bool | None = None
    """None writes TensorBoard files if the package is installed; True insists on it."""
    wandb: bool = False
    wandb_project: str = "longtake"


@dataclass
class _Pending:
    """A line whose values may still be on their way from the device."""

    line: dict[str, Any]
    names: list[str]
    values: Tensor  # (len(names),) fp64 on the host
    arrived: torch.cuda.Event


class MetricsLog:
    """One line of numbers per log step, from the process that writes.

    Tensors are fetched in one transfer per call, which the host does not wait for: on a GPU a line
    is written when the next one is logged (or at `flush`), on the CPU at once.
    """

    def __init__(
        self,
        folder: Path,
        config: MetricsConfig,
        *,
        is_writer: bool = True,
        first_step: int = 0,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the logs of a run folder. Lines of steps after `first_step`, written by a run that
        was then resumed from an earlier checkpoint, are removed; a fresh run begins at 0 with an
        empty log.

        Raises: ImportError that names the extra to install, if a requested log's package is
        missing.
        """
        self._pending: list[_Pending] = []
        self._file = self._tensorboard = self._wandb = None
        if not is_writer:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _truncate(path, last_step=first_step)
        self._tensorboard = _open_tensorboard(folder / "tensorboard", config, first_step)
        self._wandb = _open_wandb(folder, config, run_config)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Tensor | float | int]) -> dict[str, Any] | None:
        """Logs numbers after `step` steps; returns the newest line that was written, if any."""
        if self._file is None:
            return None
        line: dict[str, Any] = {"step": step, "time": time.time()}
        on_device: dict[str, Tensor] = {}
        for name, value in values.items():
            if not isinstance(value, Tensor):
                line[name] = value
                continue
            assert value.numel() == 1, (
                f"metric {name} has shape {tuple(value.shape)}, not one number"
            )
            if value.device.type == "cpu":
                line[name] = value.item()
            else:
                on_device[name] = value
        written = self._write_pending()
        if not on_device:
            return self._write(line)
        self._pending.append(_fetch(line, on_device))
        return written

    def flush(self) -> dict[str, Any] | None:
        """Waits for what is still on its way and writes it; returns the newest line, if any."""
        return self._write_pending()

    def close(self) -> None:
        """Writes what is left and closes all logs."""
        self._write_pending()
        for log in (self._file, self._tensorboard):
            if log is not None:
                log.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._tensorboard = self._wandb = None

    def _write_pending(self) -> dict[str, Any] | None:
        line = None
        for pending in self._pending:
            pending.arrived.synchronize()
            values = dict(zip(pending.names, pending.values.tolist(), strict=True))
            line = self._write(pending.line | values)
        self._pending.clear()
        return line

    def _write(self, line: dict[str, Any]) -> dict[str, Any]:
        assert self._file is not None
        # JSON has no word for NaN and infinity.
        finite = {key: value if _is_finite(value) else None for key, value in line.items()}
        self._file.write(json_line(finite))
        self._file.flush()
        numbers = {key: value for key, value in line.items() if key not in ("step", "time")}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                if isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(key, value, line["step"], walltime=line["time"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])
        return line


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of a run folder's metrics."""
    return read_json_lines(folder / "metrics.jsonl")


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _fetch(line: dict[str, Any], on_device: dict[str, Tensor]) -> _Pending:
    stacked = torch.stack([value.detach().reshape(()).double() for value in on_device.values()])
    host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
    host.copy_(stacked, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Pending(line, list(on_device), host, arrived)


def _truncate(path: Path, *, last_step: int) -> None:
    if path.exists():
        lines = read_json_lines(path)
        replace_json_lines(path, [x for x in lines if last_step and x["step"] <= last_step])


def _open_tensorboard(folder: Path, config: MetricsConfig, first_step: int) -> Any:
    if config.tensorboard is False:
        return None
    if config.tensorboard is None and importlib.util.find_spec("tensorboard") is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard=True needs the tensorboard package: pip install 'longtake[train]'"
        ) from error
    # Points after the step that a run goes on from are not shown again.
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


def _open_wandb(folder: Path, config: MetricsConfig, run_config: Mapping[str, Any] | None) -> Any:
    if not config.wandb:
        return None
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "wandb=True needs the wandb package: pip install 'longtake[wandb]'"
        ) from error
    # One run folder is one W&B run, also after a resume.
    return wandb.init(
        project=config.wandb_project,
        name=folder.name,
        id=folder.name,
        resume="allow",
        dir=str(folder),
        config=dict(run_config or {}),
    )
