"""From keys and what shards hold to an index; and what the index says of samples that failed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from longtake.data import BadSample, Manifest
from longtake.store.catalog import Catalog
from longtake.store.forms import FormError
from longtake.store.index import NOT_STORED, Entries, Index
from longtake.store.keys import KEY_BYTES
from longtake.store.plan import Content, raw_key
from longtake.store.recipe import Recipe


def make_index(
    manifest: Manifest, recipe: Recipe, content: Content, catalog: Catalog, facts: dict[str, Any]
) -> Index:
    """The index of a manifest whose content the shards hold, as far as they do."""
    failures: dict[tuple[str, str], int] = {}

    def failure(reason: str, text: str) -> int:
        return -2 - failures.setdefault((reason, text), len(failures))

    found = [catalog.find(content.text), *map(catalog.find, content.clips)]
    used = np.unique(np.concatenate([rows.ravel() for rows in found]))
    used = used[used >= 0]
    for rows, keys in zip(found, [content.text, *content.clips], strict=True):
        rows[rows >= 0] = np.searchsorted(used, rows[rows >= 0])
        absent = (rows < 0) & (keys != b"")
        codes = []
        for key in keys[absent].tolist():
            failed = catalog.failures.get(raw_key(key))
            codes.append(failure(failed.reason, failed.text) if failed else NOT_STORED)
        rows[absent] = codes
    text, *clips = found
    for sample_id, error in sorted(content.failures.items()):
        for rows in clips:
            rows[sample_id] = failure(error.reason, error.text)
    # Only the shards that are used, by their place among those.
    shards, shard_of = np.unique(catalog.shard_of[used], return_inverse=True)
    names = [catalog.shards[shard] for shard in shards]
    sizes = np.array([catalog.shard_sizes[shard] for shard in shards], np.int64)
    keys = [raw_key(key) for key in catalog.keys[used]]
    entries = Entries(
        shards=names,
        shard_sizes=sizes,
        keys=np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
        shard_of=shard_of.astype(np.int64),
        begins=catalog.begins[used],
        sizes=catalog.sizes[used],
        checksums=catalog.checksums[used],
    )
    facts = {
        **facts,
        "samples": len(manifest),
        "clips": int(sum(len(np.unique(rows[rows >= 0])) for rows in clips)),
        "captions": len(np.unique(text[text >= 0])),
        "bytes": int(sizes.sum()),
    }
    if recipe.latents == "8bit":
        facts["error_of_8bit"] = _error([catalog.notes[shard] for shard in shards])
    return Index(recipe, manifest, entries, text, clips, list(failures), facts)


def _error(notes: list[dict[str, Any]]) -> dict[str, float]:
    total = FormError()
    for note in notes:
        if "error" in note:
            total.merge(FormError(**note["error"]))
    return total.summary()


def failed_samples(index: Index) -> list[BadSample]:
    """The samples of which something could not be encoded, with the first reason of each."""
    manifest = index.manifest
    worst = np.stack([rows.min(axis=1) for rows in (index.text[:, None], *index.clips)]).min(axis=0)
    return [
        BadSample(
            sample_id, manifest.texts["path"][sample_id], int(manifest.lines[sample_id]), *why
        )
        for sample_id in np.flatnonzero(worst < NOT_STORED).tolist()
        for why in [index.failures[-2 - int(worst[sample_id])]]
    ]


def manifest_facts(file: Path) -> dict[str, Any]:
    """Name and digest of a manifest's file."""
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"manifest": file.name, "manifest_sha256": digest}
