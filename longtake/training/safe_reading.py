"""Reads a distributed checkpoint's tensors without running code from it.

PyTorch's reader unpickles `.metadata` freely, unpickles byte entries, and follows whatever relative
path the metadata names. Here only the metadata's own classes can be made, there are no byte
entries, and every path must be a file that the manifest lists.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from longtake.training.checkpoint_folder import CheckpointError

METADATA = ".metadata"

_METADATA_CLASSES = (
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "ChunkStorageMetadata",
    "BytesStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13 and later
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA_CLASSES),
    *(("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
}


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint's metadata asks for something that no checkpoint of ours needs."""


class SafeReader(FileSystemReader):
    """A reader of one checkpoint folder; `files` gives the size of each file that may be read.

    Raises: UnsafeCheckpointError, before anything else is read.
    """

    def __init__(self, folder: Path, files: dict[str, int]) -> None:
        super().__init__(folder)
        self.metadata = _read_metadata(folder / METADATA)
        _check_metadata(self.metadata, folder, files)

    # No **kwargs: PyTorch would take them for leave to try another file when this one is refused.
    def read_metadata(self) -> Metadata:
        return self.metadata


class SafePlanner(DefaultLoadPlanner):
    """Plans the reading of tensors only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UnsafeCheckpointError(f"entry {read_item.dest_index.fqn} is pickled bytes, no tensor")


def check_fits(metadata: Metadata, tensors: dict[str, Tensor], folder: Path) -> None:
    """Compares names, shapes and dtypes of a checkpoint with the tensors that it should fill.

    PyTorch would ignore entries that nobody asks for, and cast dtypes without a word.

    Raises: CheckpointError that names what differs.
    """
    stored = metadata.state_dict_metadata
    problems = []
    if missing := _model_first(tensors.keys() - stored.keys()):
        problems.append(f"it lacks {_some(missing)}")
    if unexpected := _model_first(stored.keys() - tensors.keys()):
        problems.append(f"it has {_some(unexpected)} that this run has no place for")
    for name in _model_first(stored.keys() & tensors.keys()):
        entry, tensor = stored[name], tensors[name]
        assert isinstance(entry, TensorStorageMetadata)
        if entry.size != tensor.shape:
            problems.append(f"{name} is {tuple(entry.size)} there and {tuple(tensor.shape)} here")
        elif entry.properties.dtype != tensor.dtype:
            problems.append(f"{name} is {entry.properties.dtype} there and {tensor.dtype} here")
    if problems:
        raise CheckpointError(
            f"{folder} does not fit this model: {_some(problems, '; ')}. "
            "Use the config it was trained with"
        )


def _model_first(names: set[str]) -> list[str]:
    """Sorted, weights before the moments and averages that differ for the same reason."""
    return sorted(names, key=lambda name: (not name.startswith("model."), name))


def _some(names: list[str], separator: str = ", ", most: int = 6) -> str:
    rest = len(names) - most
    return separator.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafeCheckpointError(f"its metadata asks for {module}.{name}")
        return super().find_class(module, name)


def _read_metadata(path: Path) -> Metadata:
    with path.open("rb") as file:
        try:
            metadata = _MetadataUnpickler(file).load()
        except UnsafeCheckpointError as error:
            raise UnsafeCheckpointError(f"{path} is refused: {error}") from None
        except Exception as error:
            # A crafted pickle can make any exception come up.
            raise UnsafeCheckpointError(
                f"{path} is refused: it cannot be read ({error})"
            ) from error
    if not isinstance(metadata, Metadata):
        raise UnsafeCheckpointError(f"{path} is refused: it holds no metadata")
    return metadata


def _check_metadata(metadata: Metadata, folder: Path, files: dict[str, int]) -> None:
    def require(condition: bool, text: str) -> None:
        if not condition:
            raise UnsafeCheckpointError(f"{folder / METADATA} is refused: {text}")

    require(isinstance(metadata.state_dict_metadata, dict), "it has no list of tensors")
    require(isinstance(metadata.storage_data, dict), "it does not say where its tensors are")
    for name, entry in metadata.state_dict_metadata.items():
        require(isinstance(name, str), "a tensor's name is no text")
        require(isinstance(entry, TensorStorageMetadata), f"entry {name} is not a tensor")
    for index, place in metadata.storage_data.items():
        require(isinstance(index, MetadataIndex), "a tensor's index is of another kind")
        require(isinstance(place, _StorageInfo), f"the place of {index} is of another kind")
        path = place.relative_path
        require(
            isinstance(path, str) and path in files, f"it leads to {path!r}, which is not its file"
        )
        numbers = (place.offset, place.length)
        require(
            all(isinstance(number, int) and number >= 0 for number in numbers)
            and sum(numbers) <= files[path],
            f"it reads beyond the end of {path}",
        )
        require(not getattr(place, "transform_descriptors", None), "its files are transformed")
