"""The machine that a benchmark ran on, as far as it tells: GPU, power limit, clocks, commit."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch

import longtake
from longtake.training import environment

_GPU_FIELDS = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")
_LOAD_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, limits and the code's commit, as plain JSON values."""
    return environment() | {
        "gpus": torch.cuda.device_count(),
        "gpu": _ask_gpu(device, _GPU_FIELDS),
        "commit": _commit(),
    }


def clocks_now(device: torch.device) -> str | None:
    """Clocks, power and temperature at this moment; None where the driver does not say."""
    found = _ask_gpu(device, _LOAD_FIELDS)
    return ", ".join(f"{name} {value}" for name, value in found.items()) or None


def _ask_gpu(device: torch.device, fields: tuple[str, ...]) -> dict[str, str]:
    if device.type != "cuda":
        return {}
    # Not by its number: CUDA_VISIBLE_DEVICES changes PyTorch's numbering, not the driver's.
    uuid = torch.cuda.get_device_properties(device).uuid
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    answer = _output(["nvidia-smi", "-i", f"GPU-{uuid}", *query])
    values = answer.splitlines()[0].split(", ") if answer else []
    return dict(zip(fields, values, strict=False))


def _commit() -> str | None:
    """The commit of the code that runs, marked if files differ from it; None outside of git."""
    folder = str(Path(longtake.__file__).parent)
    commit = _output(["git", "-C", folder, "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return None
    changed = _output(["git", "-C", folder, "status", "--porcelain", "--untracked-files=no", "."])
    return commit + (" with changes" if changed else "")


def _output(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
