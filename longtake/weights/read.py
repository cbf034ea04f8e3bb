"""Reads weights that somebody else wrote: tensors come out, code never runs.

A file is data of unknown origin. PyTorch files go through `torch.load(weights_only=True)` after
their zip directory has been checked, and there is no second, unsafe attempt; safetensors needs no
trust. The tensors stay mapped to the file: reading costs no memory until a value is used.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# Dictionaries in which trainers hide the weights; of several, the first in this order is read.
WRAPPERS = ("ema", "state_dict", "model")
# What data-parallel and compiling wrappers put before every name.
PREFIXES = ("module.", "_orig_mod.")

# Beside an export to another library's folder: tensors of ours that its format has no place for.
EXTRA_FILE = "longtake_extra.safetensors"

_MAX_TENSORS = 100_000
_MAX_PICKLE_BYTES = 64 * 2**20
_MAX_JSON_BYTES = 64 * 2**20


class WeightsError(ValueError):
    """Weights that cannot be read, recognized or expressed; one line says why."""


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of a file or folder, and everything else that is known about them."""

    state: dict[str, Tensor]
    source: str
    container: Literal["torch", "safetensors", "run"]
    wrapper: str | None = None  # the dictionary inside the file that held the tensors
    beside: tuple[str, ...] = ()  # entries next to that dictionary, which were not read
    prefix: str = ""  # what was stripped from every name
    metadata: Mapping[str, str] = field(default_factory=dict)  # safetensors header
    config: Mapping[str, Any] = field(default_factory=dict)  # the folder's config.json

    def describe(self) -> str:
        """One line: what was read and from where inside the file."""
        parts = [f"{len(self.state)} tensors from {self.source}"]
        if self.wrapper is not None:
            parts.append(f"inside '{self.wrapper}'")
        if self.prefix:
            parts.append(f"without the prefix '{self.prefix}'")
        if self.beside:
            parts.append(f"not read beside them: {_listed(self.beside)}")
        return ", ".join(parts)


def read_state_dict(path: str | Path, *, wrapper: str | None = None) -> dict[str, Tensor]:
    """Names and tensors of a weights file or folder; see `read_weights`."""
    return read_weights(path, wrapper=wrapper).state


def read_weights(path: str | Path, *, wrapper: str | None = None) -> WeightsFile:
    """Reads a `.pt`/`.pth` file, a `.safetensors` file, or a folder of safetensors.

    A folder holds one safetensors file or an index of several (`*.safetensors.index.json`). Weights
    inside a dictionary of the file are unwrapped: `wrapper` says which one to take, by default the
    first present of `ema`, `state_dict` and `model`.

    Raises:
        WeightsError: the file is missing, damaged, hostile, of another kind or not only tensors.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")
    if path.is_dir():
        return _read_folder(path, wrapper)
    if path.suffix == ".safetensors":
        _refuse_wrapper(wrapper, path)
        state, metadata = _read_safetensors(path)
        return _finish(path, "safetensors", state, metadata=metadata)
    if path.name.endswith(".index.json"):
        _refuse_wrapper(wrapper, path)
        state, metadata = _read_shards(path)
        config = _read_config(path.parent)
        return _finish(path, "safetensors", state, metadata=metadata, config=config)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path, wrapper)
    raise WeightsError(
        f"{path}: unknown kind of file '{path.suffix}': give .safetensors, a folder of them, "
        f"or one of {', '.join(TORCH_SUFFIXES)}"
    )


def _read_folder(folder: Path, wrapper: str | None) -> WeightsFile:
    _refuse_wrapper(wrapper, folder)
    config = _read_config(folder)
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != EXTRA_FILE)
    extra = _read_safetensors(folder / EXTRA_FILE)[0] if (folder / EXTRA_FILE).is_file() else {}
    if len(indexes) == 1:
        state, metadata = _read_shards(indexes[0])
        return _finish(folder, "safetensors", state | extra, metadata=metadata, config=config)
    if not indexes and len(files) == 1:
        state, metadata = _read_safetensors(files[0])
        return _finish(folder, "safetensors", state | extra, metadata=metadata, config=config)
    if not indexes and not files:
        raise WeightsError(f"{folder}: the folder holds no .safetensors file")
    found = [file.name for file in indexes or files]
    raise WeightsError(f"{folder}: several candidates ({_listed(found)}): name one of them")


def _refuse_wrapper(wrapper: str | None, path: Path) -> None:
    if wrapper is not None:
        raise WeightsError(
            f"{path}: wrapper='{wrapper}' is for PyTorch files; safetensors are flat"
        )


# ------------------------------------------------------------------------------------ safetensors


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise WeightsError(
            f"{path}: not a readable safetensors file ({_one_line(error)})"
        ) from error


def _read_shards(index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors that an index names, each from the shard it names, and the index's metadata."""
    content = _read_json(index)
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: the index has no 'weight_map'")
    for name, shard in weight_map.items():
        # A shard is a plain neighbour: no path may lead out of the folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.\-]+\.safetensors", shard):
            raise WeightsError(f"{index}: {name!r} is in {shard!r}, which is not a plain file name")

    state: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise WeightsError(f"{index}: the shard {shard} is missing")
        tensors, _ = _read_safetensors(index.parent / shard)
        promised = {name for name, home in weight_map.items() if home == shard}
        if promised != tensors.keys():
            wrong = sorted(promised ^ tensors.keys())
            raise WeightsError(f"{index}: {shard} and the index disagree about {_listed(wrong)}")
        state.update(tensors)
    notes = metadata if isinstance(metadata, dict) else {}
    return state, {key: value for key, value in notes.items() if isinstance(value, str)}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise WeightsError(
            f"{path}: {path.stat().st_size} bytes of JSON, at most {_MAX_JSON_BYTES}"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not readable JSON ({_one_line(error)})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: the top level must be a JSON object")
    return value


# ---------------------------------------------------------------------------------- PyTorch files


def _read_torch(path: Path, wrapper: str | None) -> WeightsFile:
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a crafted file provokes; its code has not run
        raise WeightsError(f"{path}: {_why_refused(error)}") from error

    state, taken = _unwrap(content, wrapper, path)
    beside = tuple(str(name) for name in content if taken is not None and name != taken)
    strange = [_label(name, value) for name, value in state.items() if not _is_plain(name, value)]
    if strange:
        raise WeightsError(f"{path}: entries that are not plain tensors: {_listed(strange)}")
    # A view may repeat its storage for ever; copying a small file must not fill the memory.
    size, limit = sum(value.nbytes for value in state.values()), 2 * path.stat().st_size
    if size > limit:
        raise WeightsError(f"{path}: its tensors claim {size} bytes, more than the file can hold")
    state = {name: value.detach() for name, value in state.items()}
    return _finish(path, "torch", state, wrapper=taken, beside=beside)


def _check_archive(path: Path) -> None:
    """Refuses what `torch.load` should not even see: other formats, compression, huge pickles."""
    if not zipfile.is_zipfile(path):
        raise WeightsError(
            f"{path}: not a complete PyTorch file (a zip archive since PyTorch 1.6): damaged, "
            "of another kind, or so old that it must be saved again with a current PyTorch"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path}: damaged archive ({_one_line(error)})") from error
    names = [record.filename for record in records]
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(
            f"{path}: a TorchScript program, not weights: save its state_dict() instead"
        )
    if len(records) > _MAX_TENSORS:
        raise WeightsError(f"{path}: {len(records)} records, at most {_MAX_TENSORS}")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise WeightsError(
                f"{path}: compressed record '{record.filename}': not made by PyTorch"
            )
        if record.filename.endswith(".pkl") and record.file_size > _MAX_PICKLE_BYTES:
            raise WeightsError(
                f"{path}: {record.file_size} bytes of structure are no list of tensors"
            )


def _unwrap(
    content: object, wrapper: str | None, path: Path
) -> tuple[Mapping[str, Any], str | None]:
    """The dictionary that holds the tensors, and the entry it was found in."""
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    present = [name for name in content if isinstance(content[name], Mapping)]
    if wrapper is not None:
        if wrapper not in present:
            found = _listed([str(name) for name in present]) or "none"
            raise WeightsError(f"{path}: no dictionary '{wrapper}' inside; found: {found}")
        return content[wrapper], wrapper
    for name in WRAPPERS:
        if name in present:
            return content[name], name
    return content, None


def _is_plain(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided  # type: ignore[union-attr]
        and value.device.type == "cpu"  # type: ignore[union-attr]
        and not value.is_quantized  # type: ignore[union-attr]
    )


def _why_refused(error: Exception) -> str:
    blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if blocked:
        return (
            f"refused, because it holds more than tensors ({blocked[1]}): "
            "save its state_dict() alone, or as safetensors"
        )
    return f"not a readable PyTorch file ({_one_line(error)})"


# ------------------------------------------------------------------------------------------- both


def _finish(
    path: Path,
    container: Literal["torch", "safetensors"],
    state: dict[str, Tensor],
    **known: Any,
) -> WeightsFile:
    if not state:
        raise WeightsError(f"{path}: holds no tensor")
    if len(state) > _MAX_TENSORS:
        raise WeightsError(f"{path}: {len(state)} tensors, at most {_MAX_TENSORS}")
    stripped = ""
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        stripped += prefix
    return WeightsFile(state, str(path), container, prefix=stripped, **known)


def _label(name: object, value: object) -> str:
    return f"{str(name)[:80]!r} ({type(value).__name__})"


def _listed(names: list[str] | tuple[str, ...], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
