"""All that a store's shards hold, by key: read from their headers, never from a list that could be
old."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longtake.store.shards import KEY_DTYPE, Failure, Shard, read_shard, shard_names
from longtake.store.tensor_file import StoreError


@dataclass(frozen=True)
class Catalog:
    """Entries sorted by key, each key once; arrays by entry."""

    shards: list[str]
    shard_sizes: list[int]
    keys: np.ndarray  # S16
    shard_of: np.ndarray  # int64, index into shards
    begins: np.ndarray  # int64
    sizes: np.ndarray  # int64
    checksums: np.ndarray  # int64
    failures: dict[bytes, Failure]
    """Of clips that no shard holds."""
    notes: list[dict[str, Any]]
    """Of each shard."""
    damaged: dict[str, str]
    """Shards whose header cannot be used, and why; nothing of theirs is in the other fields."""

    def find(self, keys: np.ndarray) -> np.ndarray:
        """For each key (S16, any shape) its entry, -1 if there is none."""
        if not len(self.keys):
            return np.full(keys.shape, -1, np.int64)
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)


def read_catalog(store: Path, *, without: Collection[str] = ()) -> Catalog:
    """Reads every shard's header, but those of `without`. Of entries that several shards hold, the
    first by name counts."""
    shards: list[Shard] = []
    damaged: dict[str, str] = {}
    for name in shard_names(store):
        if name in without:
            continue
        try:
            shards.append(read_shard(store, name))
        except StoreError as error:
            damaged[name] = str(error)

    def joined(name: str, dtype: Any) -> np.ndarray:
        parts = [getattr(shard, name) for shard in shards]
        return np.concatenate(parts) if parts else np.zeros(0, dtype)

    counts = [len(shard.keys) for shard in shards]
    # The first of equal keys: shards are in the order of their names.
    keys, first = np.unique(joined("keys", KEY_DTYPE), return_index=True)
    failures = {failure.key: failure for shard in shards for failure in shard.failures}
    if failures:
        failed = np.array(list(failures), KEY_DTYPE)
        for key in failed[np.isin(failed, keys)]:
            del failures[bytes(key).ljust(KEY_DTYPE.itemsize, b"\0")]
    return Catalog(
        shards=[shard.name for shard in shards],
        shard_sizes=[shard.size for shard in shards],
        keys=keys,
        shard_of=np.repeat(np.arange(len(shards)), counts)[first],
        begins=joined("begins", np.int64)[first],
        sizes=joined("sizes", np.int64)[first],
        checksums=joined("checksums", np.int64)[first],
        failures=failures,
        notes=[shard.notes for shard in shards],
        damaged=damaged,
    )
