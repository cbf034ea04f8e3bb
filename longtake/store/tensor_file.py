"""Safetensors files by offset: written whole, durably, and named after their bytes; headers read
without trust.

A file is 8 bytes with the length of a JSON header, the header, and tensors back to back. Its name
ends in the first 16 hex digits of its SHA-256, so that a flipped bit anywhere shows without a list.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from longtake.data import MediaError
from longtake.data.files import open_regular

DTYPES = {
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SUFFIX = ".safetensors"
DIGEST_DIGITS = 16
# As in the safetensors library: more is no header but an attempt to fill the memory.
_MAX_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 1 << 20


class StoreError(ValueError):
    """A store, or a file of one, that is not what it should be."""

    def __init__(self, path: Path | None, problem: str) -> None:
        super().__init__(problem if path is None else f"{path}: {problem}")
        self.path, self.problem = path, problem


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in its file, in bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    tensors: dict[str, Placed]
    metadata: dict[str, str]
    size: int
    """Of the whole file, in bytes."""


def write_tensors(
    folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> Path:
    """Writes `stem-<digest>.safetensors`, complete and on the disk itself, or not at all.

    Tensors are laid out in the order given, which must keep each on a multiple of its item size.
    """
    tensors = [(name, tensor.contiguous().cpu()) for name, tensor in tensors]
    document: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        assert begin % tensor.element_size() == 0, f"{name} would begin at byte {begin}"
        document[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(document, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    temporary = folder / f".{stem}.{secrets.token_hex(4)}.tmp"
    digest = hashlib.sha256()
    with open(temporary, "xb") as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        try:
            put(len(header).to_bytes(8, "little"))
            put(header)
            for _, tensor in tensors:
                put(tensor.flatten().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
            target = folder / f"{stem}-{digest.hexdigest()[:DIGEST_DIGITS]}{SUFFIX}"
            os.replace(temporary, target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(folder)  # a full disk does not say which
            raise
    fsync_folder(folder)
    return target


def fsync_folder(folder: Path) -> None:
    """Writes a folder's new names through to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_header(path: Path) -> Header:
    """Names, places and metadata; the tensors themselves are not touched.

    Raises:
        StoreError: not a whole safetensors file, as far as its header tells.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise StoreError(path, f"no header of {length} bytes fits into its {size}")
        raw = file.read(length)
    start = 8 + length
    try:
        document = json.loads(raw)
        metadata = document.pop("__metadata__", {})
        tensors = {name: _placed(entry, start) for name, entry in document.items()}
        is_text = all(isinstance(value, str) for value in metadata.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(path, f"its header cannot be read ({error})") from error
    if not is_text:
        raise StoreError(path, "its header's metadata is not text")
    end = start
    for name, placed in tensors.items():
        if placed.begin != end:
            raise StoreError(path, f"tensor {name[:80]!r} does not begin where the last one ends")
        end = placed.end
    if end != size:
        raise StoreError(path, f"has {size} bytes, but its header describes {end}")
    return Header(tensors, metadata, size)


def _placed(entry: Mapping[str, Any], start: int) -> Placed:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [begin, end, *shape]
    if dtype not in DTYPES or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise ValueError(f"an entry of dtype {dtype!r:.20} and shape {shape!r:.80}")
    count = 1
    for number in shape:
        count *= number
    if end - begin != count * DTYPES[dtype].itemsize:
        raise ValueError(f"{end - begin} bytes for shape {shape!r:.80} of {dtype}")
    return Placed(dtype, tuple(shape), start + begin, start + end)


def is_as_named(path: Path) -> bool:
    """Whether the file's bytes are those it was named after. Reads all of them.

    Raises:
        StoreError: it cannot be read at all.
    """
    with open_file(path) as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return path.stem.endswith("-" + digest.hexdigest()[:DIGEST_DIGITS])


def open_file(path: Path) -> BinaryIO:
    """A regular file; StoreError for anything else, so that no pipe is waited for."""
    try:
        return open_regular(path)
    except MediaError as error:
        raise StoreError(path, error.text) from error
