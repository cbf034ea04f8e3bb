"""The index: a manifest's samples and where in the shards their clips and captions lie, in columns.

`store.json` names the index and is replaced last, so a store shows either the old or the new one.
Both can be made again from the manifest and the shards' headers.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtake.data import Manifest
from longtake.data.files import REASONS
from longtake.data.manifest import INTEGER_COLUMNS, SECONDS_COLUMNS, TEXT_COLUMNS, TextTable
from longtake.store.recipe import Recipe
from longtake.store.shards import is_shard_name
from longtake.store.tensor_file import (
    DTYPES,
    SUFFIX,
    StoreError,
    fsync_folder,
    is_as_named,
    open_file,
    read_header,
    write_tensors,
)

FORMAT = 1
HEADER = "store.json"
NOT_STORED = -1
"""In `text` and `clips`: nobody has encoded this. Failure k is -2 - k."""
_MAX_HEADER_BYTES = 64 * 2**20
_INDEX_NAME = re.compile(rf"index-[0-9a-f]{{16}}{SUFFIX}")


@dataclass(frozen=True)
class Entries:
    """Where things lie; arrays by entry."""

    shards: Sequence[str]
    shard_sizes: np.ndarray  # int64, by shard
    keys: np.ndarray  # uint8 (entries, 16)
    shard_of: np.ndarray  # int64
    begins: np.ndarray  # int64
    sizes: np.ndarray  # int64
    checksums: np.ndarray  # int64, CRC-32


@dataclass(frozen=True)
class Index:
    """A store as training sees it. Entry numbers count `entries`, see NOT_STORED."""

    recipe: Recipe
    manifest: Manifest
    entries: Entries
    text: np.ndarray  # int64 (samples,), entries
    clips: list[np.ndarray]  # of each of the recipe's buckets, int64 (samples, variants), entries
    failures: Sequence[tuple[str, str]]
    """Reason and text."""
    facts: dict[str, Any]
    """What is worth knowing beside: the manifest's name and digest, totals."""


def write_index(store: Path, index: Index) -> None:
    """Makes this the store's index, durably and at once. Equal indexes give equal bytes."""
    manifest = index.manifest
    columns: dict[str, np.ndarray] = {}
    for name in TEXT_COLUMNS:
        table = manifest.texts[name]
        columns |= _text_columns(f"manifest.{name}", table)
    for name in INTEGER_COLUMNS:
        columns[f"manifest.{name}"] = manifest.integers[name]
    for name in SECONDS_COLUMNS:
        columns[f"manifest.{name}"] = manifest.seconds[name]
    columns["manifest.line"] = manifest.lines
    entries = index.entries
    columns |= _text_columns("shard.name", entries.shards)
    columns["shard.size"] = entries.shard_sizes
    columns["entry.key"] = entries.keys
    columns["entry.shard"] = entries.shard_of
    columns["entry.begin"] = entries.begins
    columns["entry.size"] = entries.sizes
    columns["entry.crc32"] = entries.checksums
    columns["text"] = index.text
    for number, rows in enumerate(index.clips):
        columns[f"clips.{number}"] = rows
    columns |= _text_columns("failure.reason", [reason for reason, _ in index.failures])
    columns |= _text_columns("failure.text", [text for _, text in index.failures])
    # Widest items first keeps every column aligned.
    ordered = sorted(columns.items(), key=lambda item: -item[1].itemsize)
    tensors = [
        (name, torch.from_numpy(np.require(data, requirements=["C", "W"])))
        for name, data in ordered
    ]
    path = write_tensors(store, "index", tensors, {"format": "longtake latent store index 1"})
    body = {
        "format": FORMAT,
        "index": path.name,
        "recipe": index.recipe.to_json(),
        "facts": index.facts,
    }
    before = _index_name(store)
    for leftover in (*store.glob(".index.*.tmp"), *store.glob(f".{HEADER}.*.tmp")):
        leftover.unlink(missing_ok=True)  # of a process that ended here; this one has the claim
    replace_file(store / HEADER, json.dumps({"crc32": checksum_of(body), "store": body}, indent=1))
    # The one that was in use may be about to be opened; those before it are not.
    for old in store.glob(f"index-*{SUFFIX}"):
        if _INDEX_NAME.fullmatch(old.name) and old.name not in (path.name, before):
            old.unlink(missing_ok=True)


def read_index(store: Path) -> Index:
    """The store's index; its columns stay on the disk and are mapped.

    Raises:
        StoreError: there is none, or it is damaged, or of another version.
    """
    body = read_store_header(store)
    path = store / body["index"]
    if not is_as_named(path):
        raise StoreError(path, "its bytes are not those it was named after")
    columns = _Columns(path)
    try:
        recipe = Recipe.from_json(body["recipe"])
        manifest = _manifest(store, columns)
        count, variants = len(manifest), recipe.num_variants
        shards = columns.texts("shard.name")
        entries = Entries(
            shards=shards,
            shard_sizes=columns.array("shard.size", (len(shards),)),
            keys=columns.array("entry.key", (None, 16), torch.uint8),
            shard_of=columns.array("entry.shard", (None,)),
            begins=columns.array("entry.begin", (None,)),
            sizes=columns.array("entry.size", (None,)),
            checksums=columns.array("entry.crc32", (None,)),
        )
        _check_entries(entries)
        reasons, texts = columns.texts("failure.reason"), columns.texts("failure.text")
        if not set(reasons) <= set(REASONS):
            raise StoreError(None, "a reason of failure that is none")
        text = columns.array("text", (count,))
        clips = [columns.array(f"clips.{b}", (count, variants)) for b in range(len(recipe.buckets))]
        for rows in (text, *clips):
            if rows.max() >= len(entries.begins) or rows.min() < NOT_STORED - len(reasons):
                raise StoreError(None, "samples name entries that there are not")
        return Index(
            recipe=recipe,
            manifest=manifest,
            entries=entries,
            text=text,
            clips=clips,
            failures=list(zip(reasons, texts, strict=True)),
            facts=dict(body["facts"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(path, f"is not the index of a latent store: {error}") from error


def read_store_header(store: Path) -> dict[str, Any]:
    """The content of `store.json`, its checksum and version checked."""
    path = store / HEADER
    if not path.exists() and (store / "shards").is_dir():
        raise StoreError(
            store, "is a latent store that has not been finished: run longtake encode once more"
        )
    with open_file(path) as file:
        raw = file.read(_MAX_HEADER_BYTES)
    try:
        document = json.loads(raw)
        body = document["store"]
        is_whole = document["crc32"] == checksum_of(body)
        version, name = body["format"], body["index"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(path, f"is damaged: it cannot be read ({error!r:.100})") from error
    if not is_whole:
        raise StoreError(path, "is damaged: it does not have the checksum it should have")
    if version != FORMAT:
        raise StoreError(
            path,
            f"has format {version}, this version reads {FORMAT}: use the longtake that wrote it, "
            "or encode again",
        )
    if not isinstance(name, str) or not _INDEX_NAME.fullmatch(name):
        raise StoreError(path, f"is damaged: {name!r:.80} is not the name of an index")
    return body


def is_store(path: Path) -> bool:
    """Whether a folder is a latent store, finished or not."""
    return path.is_dir() and ((path / HEADER).exists() or (path / "shards").is_dir())


class _Columns:
    """The tensors of an index file as arrays, mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self.bytes = np.memmap(path, np.uint8, mode="r")

    def array(
        self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype = torch.int64
    ) -> np.ndarray:
        """A column of this shape (None: any number) and type."""
        placed = self.header.tensors.get(name)
        if placed is None:
            raise StoreError(None, f"no column {name}")
        sizes_fit = len(placed.shape) == len(shape) and all(
            wanted in (None, size) for size, wanted in zip(placed.shape, shape, strict=True)
        )
        if not sizes_fit or DTYPES[placed.dtype] != dtype:
            raise StoreError(None, f"column {name} is {placed.dtype} {placed.shape}")
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        return self.bytes[placed.begin : placed.end].view(kind).reshape(placed.shape)

    def texts(self, name: str) -> TextTable:
        data = self.array(f"{name}.bytes", (None,), torch.uint8)
        ends = self.array(f"{name}.ends", (None,))
        if len(ends) and not (
            ends[0] >= 0 and (np.diff(ends) >= 0).all() and ends[-1] == len(data)
        ):
            raise StoreError(None, f"column {name} is not a list of texts")
        return TextTable.from_columns(data, ends)


def _check_entries(entries: Entries) -> None:
    """Every entry lies inside a shard."""
    columns = (entries.keys, entries.shard_of, entries.begins, entries.sizes, entries.checksums)
    if len({len(column) for column in columns}) != 1:
        raise StoreError(None, "columns of entries differ in length")
    if not all(map(is_shard_name, entries.shards)):
        raise StoreError(None, "a shard has a name that no shard has")
    shard_of, begins, sizes = entries.shard_of, entries.begins, entries.sizes
    if not len(begins):
        return
    if shard_of.min() < 0 or shard_of.max() >= len(entries.shards):
        raise StoreError(None, "entries name shards that there are not")
    # Sizes first: with them in bounds, no sum can overflow.
    room = entries.shard_sizes[shard_of]
    if begins.min() < 0 or sizes.min() < 0 or (sizes > room).any() or (begins > room - sizes).any():
        raise StoreError(None, "entries lie outside of their shards")


def _manifest(store: Path, columns: _Columns) -> Manifest:
    lines = columns.array("manifest.line", (None,))
    count = len(lines)
    texts = {name: columns.texts(f"manifest.{name}") for name in TEXT_COLUMNS}
    if not count or any(len(table) != count for table in texts.values()):
        raise StoreError(None, "columns of samples differ in length")
    return Manifest(
        # The one file that changes whenever anything of the store does.
        file=store / HEADER,
        root=store,
        allow_outside_root=False,
        texts=texts,
        integers={name: columns.array(f"manifest.{name}", (count,)) for name in INTEGER_COLUMNS},
        seconds={
            name: columns.array(f"manifest.{name}", (count,), torch.float64)
            for name in SECONDS_COLUMNS
        },
        lines=lines,
        ignored_columns=(),
    )


def _text_columns(name: str, texts: Sequence[str]) -> Mapping[str, np.ndarray]:
    if not isinstance(texts, TextTable):
        table = TextTable()
        for text in texts:
            table.append(text)
        texts = table
    data, ends = texts.columns()
    return {f"{name}.bytes": data, f"{name}.ends": ends}


def _index_name(store: Path) -> str | None:
    try:
        return read_store_header(store)["index"]
    except StoreError:
        return None


def replace_file(path: Path, text: str) -> None:
    """Makes this the text of a file, durably and at once."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def checksum_of(body: Any) -> int:
    """CRC-32 of a JSON value without spaces and with sorted keys."""
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
