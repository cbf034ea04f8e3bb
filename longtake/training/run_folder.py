"""A run's folder: where everything it leaves behind lies, and `run.json`, what really ran."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import longtake
from longtake.training.checkpoint_folder import MANIFEST, latest, steps_saved

_RECORDED_PACKAGES = ("torch", "numpy", "av", "triton", "diffusers", "transformers", "safetensors")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder; nothing is created until something is written."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def bad_samples(self) -> Path:
        return self.path / "bad_samples.jsonl"

    def has_checkpoints(self) -> bool:
        """Whether a run here could be resumed."""
        return bool(steps_saved(self.checkpoints))

    def set_aside(self) -> None:
        """Give an existing folder another name, so that a run can start anew under this one."""
        if not self.path.exists():
            return
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(target)

    def write_config(self, text: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        _write_atomically(self.config, text)

    def write_record(self, values: dict[str, Any]) -> None:
        """Write `run.json` anew."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write_atomically(self.record, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def read_record(self) -> dict[str, Any]:
        with open(self.record, encoding="utf-8") as file:
            return json.load(file)


def find_checkpoint(path: Path) -> Path:
    """The newest undamaged checkpoint of a run's folder, or the checkpoint that `path` itself is.

    Raises: ValueError if it is neither.
    """
    if (path / MANIFEST).exists():
        return path
    found = latest(RunFolder(path).checkpoints)
    if found is None:
        raise ValueError(
            f"{path} holds no checkpoint: expected a run's folder (with checkpoints/step-N in it) "
            "or one checkpoint's folder"
        )
    return found


def environment() -> dict[str, Any]:
    """Versions and hardware, for `run.json`."""
    device: dict[str, Any] = {"type": "cpu", "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        device = {
            "type": "cuda",
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["longtake", *sys.argv[1:]],
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": _versions(),
        "device": device,
    }


def _versions() -> dict[str, str]:
    found = {"longtake": longtake.__version__}
    for name in _RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
