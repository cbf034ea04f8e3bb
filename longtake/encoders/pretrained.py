"""What the loaders of pretrained encoders share: sources, precision, identity of weights."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What loading a damaged, incomplete or unreachable encoder raises, in either library.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError)

_RANDOM_HINT = (
    "for benchmarks and tests without weights: --encoder-weights random, "
    "which builds the same class from its config"
)


def import_library(name: str) -> ModuleType:
    """The optional package that holds the pretrained classes."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"pretrained encoders need the package {name}: pip install 'longtake[pretrained]'"
        ) from error


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype an encoder computes in; `auto` is bf16 on CUDA, fp32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ValueError(f"encoder dtype={name!r} is unknown: use auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


@dataclass(frozen=True)
class Source:
    """Where an encoder's files are: a folder, or a name on the hub with its options."""

    name: str
    folder: Path | None
    options: dict[str, str]
    """Arguments for the library beside the name; none for a folder."""

    def describe(self) -> dict[str, object]:
        """For the encoder's provenance."""
        return {"source": self.name, **self.options}


def locate(path: str, subfolder: str | None, revision: str | None = None) -> Source:
    """The source that a path means; nothing is read or fetched.

    Raises:
        ValueError: the path can only be a folder and it is not there, or it is one without
        config.json.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        # A hub name is `name` or `owner/name`; anything else was meant to be a folder.
        if not path or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise ValueError(
                f"the encoder's folder {path!r} does not exist: give a folder with config.json and "
                f"weights, or a name on the hub; {_RANDOM_HINT}"
            )
        options = {"subfolder": subfolder, "revision": revision}
        return Source(path, None, {key: value for key, value in options.items() if value})
    folder = folder / subfolder if subfolder else folder
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"the encoder's folder '{folder}' has no config.json: give the folder that "
            "`save_pretrained` wrote, or its parent as the path and its name as the subfolder"
        )
    return Source(str(folder), folder, {})


def load_failure(what: str, source: Source, error: Exception) -> ValueError:
    """The error to raise when a library could not load an encoder: its reason, and what to do."""
    reason = " ".join(str(error).split())[:600]
    if source.folder:
        remedy = "the folder must hold config.json and complete weights"
    else:
        remedy = (
            "if the hub cannot be reached, give a folder that holds config.json and the weights, "
            f"or fill the hub's cache beforehand (hf download {source.name})"
        )
    return ValueError(
        f"cannot load {what} from {source.name!r}: {reason}; {remedy}; {_RANDOM_HINT}"
    )


def check_complete(what: str, source: Source, loading_info: Mapping[str, Any]) -> None:
    """Raises a ValueError if the weights left parts of the model at their initial values."""
    for problem in ("missing", "mismatched"):
        keys = sorted(str(key) for key in loading_info.get(f"{problem}_keys") or ())
        if keys:
            raise ValueError(
                f"the weights of {what} in {source.name!r} have {len(keys)} {problem} keys, first "
                f"{', '.join(keys[:3])}: the files do not belong to this class and config"
            )


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, without the library's own bookkeeping (keys in underscores)."""
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module, *, values_per_tensor: int = 64) -> str:
    """SHA-256 over the name, shape and evenly spaced values of every tensor of a model.

    It tells apart checkpoints of one class wherever they lie and however their files are cut, at
    the price of one small copy from the device instead of reading gigabytes. Values count as
    bfloat16: a model has the same digest in that precision and in float32.
    """
    digest = hashlib.sha256()
    samples = []
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.flatten()
        samples.append(flat[:: max(1, flat.numel() // values_per_tensor)].bfloat16())
    digest.update(torch.cat(samples).float().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Modules and random numbers are made on the device from the seed; the old state returns."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        yield


def freeze(model: nn.Module) -> None:
    """Evaluation mode, no gradients."""
    model.eval().requires_grad_(False)
