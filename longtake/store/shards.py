"""Shards: safetensors files of encoded clips or captions, each complete in itself.

A header tells what its shard holds (keys, checksums, failures), so that the index can be made again
at any time. A shard is never changed. Its name says which list of work it does and which bytes it
has: `clips-<list>-<digest>.safetensors`.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longtake.data.files import REASONS
from longtake.store.keys import KEY_BYTES
from longtake.store.tensor_file import (
    DIGEST_DIGITS,
    SUFFIX,
    Header,
    StoreError,
    read_header,
    write_tensors,
)

Kind = Literal["clips", "text"]
_NAME = re.compile(rf"(clips|text)-[0-9a-f]{{16}}-[0-9a-f]{{{DIGEST_DIGITS}}}{SUFFIX}")
_MAX_TEXT = 1000
KEY_DTYPE = np.dtype(f"S{KEY_BYTES}")


@dataclass(frozen=True)
class Record:
    """One entry to be written: its tensors, with the ends of their names."""

    key: bytes
    tensors: Sequence[tuple[str, Tensor]]


@dataclass(frozen=True)
class Failure:
    """A clip that could not be encoded, and why."""

    key: bytes
    reason: str
    text: str


@dataclass(frozen=True)
class Shard:
    """What a shard's header says of its entries; arrays by entry."""

    name: str
    size: int
    keys: np.ndarray  # S16
    begins: np.ndarray  # int64, bytes from the file's beginning
    sizes: np.ndarray  # int64
    checksums: np.ndarray  # int64, CRC-32
    failures: list[Failure]
    notes: dict[str, Any]


def shards_folder(store: Path) -> Path:
    return store / "shards"


def write_shard(
    store: Path,
    kind: Kind,
    work: str,
    records: Sequence[Record],
    failures: Sequence[Failure],
    notes: Mapping[str, Any],
) -> Path:
    """Writes a shard for the list of work whose digest is `work`."""
    checksums = {record.key.hex(): _checksum(record) for record in records}
    metadata = {
        "format": "longtake latent store 1",
        "kind": kind,
        "crc32": json.dumps(checksums),
        "failures": json.dumps([[f.key.hex(), f.reason, f.text[:_MAX_TEXT]] for f in failures]),
        "notes": json.dumps(notes, sort_keys=True),
    }
    tensors = [
        (f"{record.key.hex()}.{end}", tensor)
        for record in records
        for end, tensor in record.tensors
    ]
    return write_tensors(shards_folder(store), f"{kind}-{work}", tensors, metadata)


def _checksum(record: Record) -> int:
    crc = 0
    for _, tensor in record.tensors:
        crc = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return crc


def is_shard_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def shard_names(store: Path) -> list[str]:
    """Of all complete shards, sorted."""
    try:
        with os.scandir(shards_folder(store)) as entries:
            return sorted(entry.name for entry in entries if is_shard_name(entry.name))
    except FileNotFoundError:
        return []


def read_shard(store: Path, name: str) -> Shard:
    """A shard's header. Raises StoreError if it is not one."""
    if not is_shard_name(name):
        raise StoreError(store, f"{name!r:.80} is not the name of a shard")
    path = shards_folder(store) / name
    header = read_header(path)
    try:
        checksums = json.loads(header.metadata["crc32"])
        failures = [
            Failure(_key(key), reason, str(text)[:_MAX_TEXT])
            for key, reason, text in json.loads(header.metadata["failures"])
        ]
        notes = json.loads(header.metadata["notes"])
        keys, begins, sizes = _extents(header)
        crcs = [checksums[key] for key in keys]
        well = all(type(crc) is int and 0 <= crc < 2**32 for crc in crcs)
        well &= all(failure.reason in REASONS for failure in failures) and isinstance(notes, dict)
        raw = np.array([_key(key) for key in keys], KEY_DTYPE)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(path, f"its header is not that of a shard ({error!r:.200})") from error
    if not well:
        raise StoreError(path, "its header's values are out of range")
    return Shard(
        name=name,
        size=header.size,
        keys=raw,
        begins=np.array(begins, np.int64),
        sizes=np.array(sizes, np.int64),
        checksums=np.array(crcs, np.int64),
        failures=failures,
        notes=notes,
    )


def _extents(header: Header) -> tuple[list[str], list[int], list[int]]:
    """Key, begin and size of every entry; the tensors of one lie side by side."""
    keys: list[str] = []
    begins: list[int] = []
    sizes: list[int] = []
    for name, placed in header.tensors.items():
        key = name.partition(".")[0]
        if not keys or keys[-1] != key:
            keys.append(key)
            begins.append(placed.begin)
            sizes.append(0)
        sizes[-1] += placed.end - placed.begin
    return keys, begins, sizes


def _key(text: str) -> bytes:
    key = bytes.fromhex(text)
    if len(key) != KEY_BYTES:
        raise ValueError(f"{text!r:.40} is not a key")
    return key
