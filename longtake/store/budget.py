"""The mix: what of a data set's encodings to keep on a disk that cannot hold them all.

What is kept saves the training steps its encoding; the rest they do themselves. Clips and captions
are worth

    seconds of encoding · times that a step asks for them / bytes

and the disk is filled with what is worth most, list by list, a list being what becomes a shard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longtake.data import DataConfig, Manifest
from longtake.data.manifest import TEXT_COLUMNS
from longtake.store.catalog import Catalog
from longtake.store.forms import record_bytes
from longtake.store.index import Index
from longtake.store.plan import Content, Group, WorkList, first_rows, largest_size
from longtake.store.rates import Rates
from longtake.store.recipe import Recipe, bucket_sizes
from longtake.store.shards import shards_folder

# In a header: name, shape and offsets of a tensor, and the checksum of an entry; at most.
_TENSOR_HEADER_BYTES = 130
_ENTRY_HEADER_BYTES = 60
# An entry that fails leaves its reason in the place of its bytes.
_FAILURE_BYTES = 1200
# Of a shard's header, beside the encoder's provenance.
_HEADER_BYTES = 2048
# In the index: columns of 8 bytes per sample and per entry, see `index.write_index`.
_SAMPLE_COLUMNS = 12
_ENTRY_BYTES = 48
_INDEX_BYTES = 16_384
# Shards so small, against the budget, that what does not fit is little.
_SHARDS_PER_BUDGET = 64

Demand = Mapping[Group, np.ndarray]
"""Times per training step that each sample's clips (each variant of them) or caption are asked for;
float64 (samples,). What several samples share counts for the first of them."""


def demand_of(content: Content, recipe: Recipe, data: DataConfig) -> Demand:
    """How often a run with these buckets asks for what it needs."""
    count = len(content.text)
    wanted = np.zeros(count)
    demand: dict[Group, np.ndarray] = {}
    per_step = _samples_per_step(recipe, data)
    for bucket, keys in enumerate(content.clips):
        pool = keys[:, 0] != b""
        rate = np.where(pool, per_step[bucket] / max(1, pool.sum()), 0.0)
        wanted += rate
        demand["clips", bucket] = _added_up(keys[:, 0], rate) / recipe.num_variants
    if recipe.text is not None:
        demand["text", 0] = _added_up(content.text, wanted)
    return demand


def _samples_per_step(recipe: Recipe, data: DataConfig) -> list[float]:
    """Of each of the recipe's buckets, all processes together, on average."""
    total = sum(bucket.weight for bucket in data.buckets)
    per_step = [0.0] * len(recipe.buckets)
    for bucket in data.buckets:
        share = bucket.weight / total * bucket.batch_size
        per_step[recipe.buckets.index(bucket_sizes(bucket))] += share
    return per_step


def _added_up(keys: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """The rates of equal keys, summed in the row of the first."""
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    summed = np.zeros(len(rate))
    summed[first] = np.bincount(place, rate, minlength=len(first))
    summed[keys == b""] = 0.0
    return summed


@dataclass(frozen=True)
class Budget:
    """So many bytes for shards and index, and what it takes to spend them well."""

    size: int
    manifest: Manifest
    recipe: Recipe
    content: Content
    demand: Demand
    rates: Rates

    def shard_bytes(self, wanted: int) -> int:
        """The size of shards, made smaller for a small budget."""
        return max(1, min(wanted, self.size // _SHARDS_PER_BUDGET))

    def room(self, catalog: Catalog) -> int:
        """Bytes that are not spent yet; negative if more are."""
        return self.size - self.index_bytes - sum(catalog.shard_sizes)

    @property
    def index_bytes(self) -> int:
        """At most; twice, since the index in use is only replaced by a complete one."""
        size = sum(_text_bytes(self.manifest.texts[name]) for name in TEXT_COLUMNS)
        variants = len(self.recipe.buckets) * self.recipe.num_variants
        size += 8 * len(self.manifest) * (_SAMPLE_COLUMNS + variants)
        groups = [self.content.keys_of(group) for group in self.demand]
        size += _ENTRY_BYTES * sum(len(first_rows(keys)) * keys.shape[1] for keys in groups)
        return 2 * (size + _INDEX_BYTES)

    def affordable(self, work: Sequence[WorkList], catalog: Catalog) -> list[WorkList]:
        """The lists worth most, as many as there is surely room for.

        A function of what the store holds: whatever other processes have done of these lists
        meanwhile, they choose no others, and together never more than fits.
        """
        room, chosen = self.room(catalog), []
        # Rounded, so that lists of one kind stay in their order, whatever the last bit of a sum.
        for item in sorted(work, key=lambda item: -float(f"{self.worth(item):.6g}")):
            room -= self.bound(item)
            if room < 0:
                break
            chosen.append(item)
        return chosen

    def bound(self, item: WorkList) -> int:
        """The size of a list's shard, at most."""
        recipe = self.recipe
        encoder = recipe.video if item.kind == "clips" else recipe.text
        assert encoder is not None
        tensors = 1 if item.kind == "text" else 2 if recipe.latents == "bf16" else 4
        entry = max(_FAILURE_BYTES, self._entry_bound(item))
        entry += _ENTRY_HEADER_BYTES + tensors * _TENSOR_HEADER_BYTES
        return item.num_items * entry + _HEADER_BYTES + len(json.dumps(encoder.provenance))

    def _entry_bound(self, item: WorkList) -> int:
        if item.kind == "text":
            return largest_size(item, self.recipe) // max(1, item.num_items)
        # What was measured is what the encoder gives: a mean alone, or a log-variance, too.
        shape = self.recipe.latent_shapes[item.bucket]
        sizes = [
            record_bytes(shape, self.recipe.latents, with_posterior=has) for has in (False, True)
        ]
        measured = self.rates[item.group].num_bytes
        return min((size for size in sizes if size >= measured), default=sizes[-1])

    def worth(self, item: WorkList) -> float:
        """Seconds of encoding that a step is saved per byte of this list."""
        rate = self.rates[item.group]
        asked = float((self.demand[item.group][item.sample_ids] * item.missing.sum(axis=1)).sum())
        return asked * rate.seconds / (item.num_items * rate.num_bytes)

    def too_much(self, catalog: Catalog, work: Sequence[WorkList]) -> list[str]:
        """Shards to be removed: of those that hold nothing any sample needs as many as it takes to
        make room for `work`, then those worth least until the rest fits."""
        room = self.room(catalog)
        wanted = room - sum(map(self.bound, work))
        worth = self._worth_of_shards(catalog)
        removed = []
        for shard in np.argsort(worth, kind="stable").tolist():
            if room >= 0 and (worth[shard] > 0 or wanted >= 0):
                break
            room += catalog.shard_sizes[shard]
            wanted += catalog.shard_sizes[shard]
            removed.append(catalog.shards[shard])
        return removed

    def _worth_of_shards(self, catalog: Catalog) -> np.ndarray:
        """As of lists, of what the shards hold."""
        saved = np.zeros(len(catalog.keys))
        for group, asked in self.demand.items():
            keys = self.content.keys_of(group)
            ids = first_rows(keys)
            entries = catalog.find(keys[ids])
            per_entry = np.broadcast_to(asked[ids, None], entries.shape)
            found = (entries >= 0) & (keys[ids] != b"")
            np.add.at(saved, entries[found], per_entry[found] * self.rates[group].seconds)
        sums = np.bincount(catalog.shard_of, saved, minlength=len(catalog.shards))
        return sums / np.array(catalog.shard_sizes) if len(sums) else sums


def remove_shards(store: Path, names: Sequence[str]) -> None:
    """Gives the space of shards back; no index may name them any more."""
    for name in names:
        (shards_folder(store) / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Share:
    """How much of a group a store holds, and what that is worth."""

    group: Group
    kept: int
    needed: int
    kept_per_step: float
    """Of those that a step asks for."""
    needed_per_step: float


def shares_kept(index: Index, content: Content, demand: Demand) -> list[Share]:
    """Group by group, what the index names of what the manifest needs; failures are not needed."""
    shares = []
    for group, asked in demand.items():
        keys = content.keys_of(group)
        ids = first_rows(keys)
        kind, bucket = group
        rows = (index.text[:, None] if kind == "text" else index.clips[bucket])[ids]
        kept = rows >= 0
        needed = (keys[ids] != b"") & (rows >= -1)
        per_step = np.broadcast_to(asked[ids, None], rows.shape)
        shares.append(
            Share(
                group=group,
                kept=int(kept.sum()),
                needed=int(needed.sum()),
                kept_per_step=float(per_step[kept].sum()),
                needed_per_step=float(per_step[needed].sum()),
            )
        )
    return shares


def _text_bytes(texts: Sequence[str]) -> int:
    columns = getattr(texts, "columns", None)
    if columns is not None:
        return len(columns()[0])
    return sum(len(text.encode()) for text in texts)
