"""Reading every byte of a store, naming what is damaged, setting it aside to be encoded again."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longtake.store.claims import take_claim
from longtake.store.index import HEADER, Index, read_index, read_store_header
from longtake.store.rates import FILE as RATES
from longtake.store.rates import read_rates
from longtake.store.shards import read_shard, shard_names, shards_folder
from longtake.store.tensor_file import StoreError, fsync_folder, is_as_named

log = logging.getLogger(__name__)

_SHOWN = 3
_MISSING = "is missing"


@dataclass(frozen=True)
class Damage:
    """A file of a store that is not what was written, or not there."""

    file: str
    """Relative to the store."""
    problem: str
    lost: str = ""
    """Whose clips or captions were in it, as far as known."""

    @property
    def is_shard(self) -> bool:
        """Whether there is a shard to set aside."""
        return self.file.startswith("shards/") and self.problem != _MISSING

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}" + (f"; it held {self.lost}" if self.lost else "")


def find_damage(store: Path, *, share: int = 0, shares: int = 1) -> list[Damage]:
    """Reads all files (of the shards, every so many-th) and names those that are damaged."""
    damages, index = [], None
    try:
        index = read_index(store)
    except StoreError as error:
        # Which of the two it is: an index cannot be looked for without the header that names it.
        try:
            name = read_store_header(store)["index"]
        except StoreError:
            name = HEADER
        damages = [Damage(name, error.problem)]
    if (store / RATES).exists():
        try:
            read_rates(store)
        except StoreError as error:
            damages.append(Damage(RATES, error.problem))
    present = shard_names(store)
    expected = [] if index is None else list(index.entries.shards)
    absent = sorted(set(expected) - set(present))
    if index is not None:
        damages += [Damage(f"shards/{n}", _MISSING, _lost(index, n)) for n in absent]
    if share:
        damages = []
    mine = present[share::shares]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, problem in zip(
            mine, threads.map(lambda n: _problem(store, n), mine), strict=True
        ):
            if problem is not None:
                lost = "" if index is None else _lost(index, name)
                damages.append(Damage(f"shards/{name}", problem, lost))
    return damages


def _problem(store: Path, name: str) -> str | None:
    try:
        if not is_as_named(shards_folder(store) / name):
            return "its bytes are not those it was named after"
        read_shard(store, name)
    except StoreError as error:
        return error.problem
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def set_aside(store: Path, names: Iterable[str]) -> None:
    """Gives damaged shards a name that is no shard's. What another process has written anew under
    the same name stays."""
    for name in names:
        claim = take_claim(store, name.rpartition("-")[0])
        if claim is None:
            log.info("%s is being encoded again by another process", name)
            continue
        try:
            if _problem(store, name) is not None:
                path = shards_folder(store) / name
                path.replace(path.with_name(f"{name}.damaged"))
                fsync_folder(path.parent)
        except FileNotFoundError:
            pass
        finally:
            claim.release()


def _lost(index: Index, name: str) -> str:
    """The samples whose clips or captions lie in a shard, in words."""
    entries = index.entries
    shard = list(entries.shards).index(name) if name in entries.shards else None
    if shard is None:
        return "nothing that the index uses"
    inside = np.append(entries.shard_of == shard, False)  # the last place serves rows below 0
    what = "captions" if name.startswith("text-") else "clips"
    columns = [index.text[:, None]] if what == "captions" else index.clips
    hits = np.zeros(len(index.manifest), bool)
    for rows in columns:
        hits |= inside[np.where(rows < 0, -1, rows)].any(axis=1)
    ids = np.flatnonzero(hits)
    paths = list(dict.fromkeys(index.manifest.texts["path"][i] for i in ids.tolist()))
    more = f" and {len(paths) - _SHOWN} more files" if len(paths) > _SHOWN else ""
    return f"{what} of {len(ids)} samples ({', '.join(paths[:_SHOWN])}{more})"
