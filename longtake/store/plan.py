"""What there is to do: which clips and captions a manifest needs, which of them a store lacks, and
how these are cut into lists, each of which becomes a shard.

Lists are cut by number, not by bytes. A list that is done disappears whole from what is missing, so
a run that was interrupted cuts the rest as the first one would have, and ends with the same shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from longtake.data import Bucket, Manifest, MediaError
from longtake.data.stream import eligible
from longtake.store.catalog import Catalog
from longtake.store.forms import record_bytes
from longtake.store.keys import KEY_BYTES, NO_KEY, clip_keys, list_digest, text_key
from longtake.store.recipe import Recipe
from longtake.store.shards import KEY_DTYPE, Kind

# Per shard: a header of some megabytes, however small the entries are.
_MAX_ENTRIES = 20_000


Group = tuple[Kind, int]
"""The clips of a bucket, or the captions (bucket 0)."""


@dataclass(frozen=True)
class Content:
    """The keys of all that a manifest needs; zeros where a sample needs nothing."""

    clips: list[np.ndarray]  # by bucket, S16 (samples, variants)
    text: np.ndarray  # S16 (samples,)
    failures: Mapping[int, MediaError]
    """Samples whose file could not even be opened."""

    def keys_of(self, group: Group) -> np.ndarray:
        """S16 (samples, variants)."""
        kind, bucket = group
        return self.text[:, None] if kind == "text" else self.clips[bucket]


@dataclass(frozen=True)
class WorkList:
    """What becomes one shard."""

    kind: Kind
    name: str
    """16 hex digits that stand for its keys."""
    bucket: int
    sample_ids: np.ndarray  # int64 (n,)
    missing: np.ndarray  # bool (n, variants)
    keys: np.ndarray  # S16 (n, variants)

    @property
    def group(self) -> Group:
        return self.kind, self.bucket

    @property
    def num_items(self) -> int:
        return int(self.missing.sum())


def content_of(
    manifest: Manifest,
    recipe: Recipe,
    file_keys: np.ndarray,
    failures: Mapping[int, MediaError],
) -> Content:
    """The keys of every clip and caption; see `keys.file_keys` for the last two.

    Raises:
        ValueError: no sample suits a bucket.
    """
    count = len(manifest)
    wanted = np.zeros(count, bool)
    clips = []
    for number, (num_frames, height, width) in enumerate(recipe.buckets):
        bucket = Bucket(num_frames=num_frames, height=height, width=width)
        pool = eligible(manifest, bucket, fps=recipe.fps, frame_interval=recipe.frame_interval)
        wanted[pool.ids] = True
        digest = recipe.clip_digest(number)
        keys = np.zeros((count, recipe.num_variants), KEY_DTYPE)
        for sample_id in pool.ids.tolist():
            if sample_id not in failures:
                sample = manifest[sample_id]
                file_key = file_keys[sample_id].tobytes()
                joined = clip_keys(recipe, digest, file_key, sample.start, sample.end)
                keys[sample_id] = np.frombuffer(joined, KEY_DTYPE)
        clips.append(keys)
    text = np.zeros(count, KEY_DTYPE)
    if recipe.text is not None:
        digest = recipe.text_digest()
        for sample_id in np.flatnonzero(wanted).tolist():
            text[sample_id] = text_key(digest, manifest.texts["caption"][sample_id])
    return Content(clips, text, failures)


def missing_work(
    content: Content,
    recipe: Recipe,
    catalog: Catalog,
    *,
    shard_bytes: int,
    retry_failed: bool = False,
    demand: Mapping[Group, np.ndarray] | None = None,
) -> list[WorkList]:
    """What the store lacks, in lists of `shard_bytes` at most (or one sample); captions first.

    Clips that failed before count as done, unless they are to be tried again. With `demand`, a
    number for each sample, those that are asked for most often come first among their like.
    """
    tried = np.array([] if retry_failed else list(catalog.failures), KEY_DTYPE)
    work = []
    if recipe.text is not None:
        captions = min(_MAX_ENTRIES, max(1, shard_bytes // _largest("text", 0, recipe)))
        work += _cut(("text", 0), content, catalog, tried, captions, demand)
    for bucket in range(len(content.clips)):
        clips = min(_MAX_ENTRIES, shard_bytes // _largest("clips", bucket, recipe))
        samples = max(1, clips // recipe.num_variants)
        work += _cut(("clips", bucket), content, catalog, tried, samples, demand)
    return work


def largest_size(item: WorkList, recipe: Recipe) -> int:
    """Bytes of a list's statistics or embeddings, were they all as large as can be."""
    return item.num_items * _largest(item.kind, item.bucket, recipe)


def _largest(kind: Kind, bucket: int, recipe: Recipe) -> int:
    if kind == "text":
        assert recipe.text is not None
        return 2 * recipe.text.facts["max_tokens"] * recipe.text.facts["channels"]
    return record_bytes(recipe.latent_shapes[bucket], recipe.latents, with_posterior=True)


def _cut(
    group: Group,
    content: Content,
    catalog: Catalog,
    tried: np.ndarray,
    samples_per_list: int,
    demand: Mapping[Group, np.ndarray] | None,
) -> list[WorkList]:
    keys = content.keys_of(group)
    ids = first_rows(keys)
    if demand is not None:
        ids = ids[np.argsort(-demand[group][ids], kind="stable")]
    keys = keys[ids]
    missing = (keys != b"") & (catalog.find(keys) < 0) & ~np.isin(keys, tried)
    rows = np.flatnonzero(missing.any(axis=1))
    work = []
    for begin in range(0, len(rows), samples_per_list):
        part = rows[begin : begin + samples_per_list]
        name = list_digest(raw_key(key) for key in keys[part][missing[part]])
        work.append(WorkList(group[0], name, group[1], ids[part], missing[part], keys[part]))
    return work


def first_rows(keys: np.ndarray) -> np.ndarray:
    """The samples that stand for all with the same keys, in their order. The same file, range or
    caption may come in several rows: its first one is encoded."""
    _, first = np.unique(keys[:, 0], return_index=True)
    return np.sort(first)


def raw_key(key: bytes) -> bytes:
    """The 16 bytes of a key that numpy has stripped of zeros at its end."""
    return bytes(key).ljust(KEY_BYTES, b"\0")


assert np.array([NO_KEY], KEY_DTYPE)[0] == b"", "numpy strips zeros: no key is the empty string"
