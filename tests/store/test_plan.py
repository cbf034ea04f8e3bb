"""What is missing, and how it is cut into lists that stay the same when some of them are done."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from longtake.data import Bucket, DataConfig, MediaError, read_manifest
from longtake.encoders import TextEncoderConfig, VideoEncoderConfig
from longtake.encoders.dct import DctEncoder
from longtake.encoders.hashed_words import HashedWordsEncoder
from longtake.store import plan
from longtake.store.assemble import failed_samples, make_index
from longtake.store.catalog import read_catalog
from longtake.store.forms import pack
from longtake.store.index import NOT_STORED
from longtake.store.plan import content_of, missing_work, raw_key
from longtake.store.recipe import make_recipe
from longtake.store.shards import Failure, Record, read_shard, shards_folder, write_shard
from tests.programs.runs import write_manifest

BUCKETS = (Bucket(num_frames=4, height=16, width=16), Bucket(num_frames=1, height=16, width=16))
COUNT = 10


@pytest.fixture
def recipe():
    return make_recipe(
        DataConfig(buckets=BUCKETS, flip=True),
        video_config=VideoEncoderConfig(),
        video_encoder=DctEncoder(),
        text_config=TextEncoderConfig(),
        text_encoder=HashedWordsEncoder(max_tokens=8, channels=16),
    )


def _manifest(folder, rows):
    return read_manifest(write_manifest(folder / "m.jsonl", rows))


def _content(folder, recipe, rows=None, failures=()):
    """What a manifest of ten files needs; the files themselves are never opened."""
    rows = rows or [{"path": f"{k}.mp4", "caption": f"clip {k}"} for k in range(COUNT)]
    manifest = _manifest(folder, rows)
    names = [row["path"].encode().ljust(16) for row in rows]
    keys = np.frombuffer(b"".join(names), np.uint8).reshape(-1, 16)
    return manifest, content_of(manifest, recipe, keys, dict(failures))


def _do(store, recipe, item, *, failing=()):
    """Writes an item's shard, with numbers of no meaning."""
    shards_folder(store).mkdir(exist_ok=True)
    records, failures = [], []
    for row, sample_id in enumerate(item.sample_ids):
        for variant in np.flatnonzero(item.missing[row]):
            key = raw_key(item.keys[row, variant])
            if sample_id in failing:
                failures.append(Failure(key, "too_short", "one frame"))
            elif item.kind == "text":
                records.append(Record(key, [("text", torch.ones(3, 16).bfloat16())]))
            else:
                mean = torch.full(recipe.latent_shapes[item.bucket], float(sample_id))
                records.append(Record(key, pack(mean, None, "bf16")))
    return write_shard(store, item.kind, item.name, records, failures, {})


def _work(content, recipe, store, **options):
    # Three samples with two sides of 4 x 2 x 2 latents each; a dozen captions.
    return missing_work(
        content, recipe, read_catalog(store), shard_bytes=6 * 24 * 16 * 2 * 2, **options
    )


def test_an_empty_store_lacks_everything_in_lists_of_one_size(tmp_path, recipe):
    _, content = _content(tmp_path, recipe)
    work = _work(content, recipe, tmp_path)
    assert [(item.kind, item.bucket, len(item.sample_ids)) for item in work] == [
        ("text", 0, 10),
        *[("clips", 0, count) for count in (3, 3, 3, 1)],
        ("clips", 1, 10),
    ]
    assert sum(item.num_items for item in work) == COUNT + 2 * COUNT * 2
    assert len({item.name for item in work}) == len(work)


def test_small_entries_do_not_make_huge_headers(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(plan, "_MAX_ENTRIES", 4)
    _, content = _content(tmp_path, recipe)
    work = missing_work(content, recipe, read_catalog(tmp_path), shard_bytes=2**30)
    assert [(item.kind, len(item.sample_ids)) for item in work] == [
        *[("text", count) for count in (4, 4, 2)],
        *[("clips", 2)] * 10,  # two sides of each
    ]


@pytest.mark.parametrize("done", [(1,), (2, 4), (0, 3, 5), (4,)], ids=str)
def test_lists_that_are_done_leave_the_others_as_they_were(tmp_path, recipe, done):
    _, content = _content(tmp_path, recipe)
    work = _work(content, recipe, tmp_path)
    for number in done:
        _do(tmp_path, recipe, work[number], failing={1, 5})
    left = _work(content, recipe, tmp_path)
    assert [item.name for item in left] == [
        item.name for number, item in enumerate(work) if number not in done
    ]


def test_equal_files_and_captions_are_encoded_once(tmp_path, recipe):
    rows = [
        {"path": "a", "caption": "same", "start": 0.0},
        {"path": "a", "caption": "same"},
        {"path": "a", "caption": "other", "start": 1.0},
    ]
    manifest, content = _content(tmp_path, recipe, rows)
    work = _work(content, recipe, tmp_path)
    assert [item.sample_ids.tolist() for item in work] == [[0, 2]] * 3
    for item in work:
        _do(tmp_path, recipe, item)
    index = make_index(manifest, recipe, content, read_catalog(tmp_path), {})
    assert (index.clips[0] >= 0).all()
    assert np.array_equal(index.clips[0][0], index.clips[0][1])
    assert index.text[0] == index.text[1] != index.text[2]
    assert (index.facts["clips"], index.facts["captions"]) == (8, 2)


def test_failures_count_as_done_unless_tried_again(tmp_path, recipe):
    manifest, content = _content(tmp_path, recipe)
    work = _work(content, recipe, tmp_path)
    for item in work:
        _do(tmp_path, recipe, item, failing={4} if item.kind == "clips" else ())
    assert _work(content, recipe, tmp_path) == []
    again = _work(content, recipe, tmp_path, retry_failed=True)
    assert [(item.kind, item.sample_ids.tolist()) for item in again] == [("clips", [4])] * 2

    index = make_index(manifest, recipe, content, read_catalog(tmp_path), {})
    assert [(s.sample_id, s.path, s.reason, s.text) for s in failed_samples(index)] == [
        (4, "4.mp4", "too_short", "one frame")
    ]
    _do(tmp_path, recipe, again[0])
    index = make_index(manifest, recipe, content, read_catalog(tmp_path), {})
    assert (index.clips[0] >= 0).all()
    assert (index.clips[1][4] < NOT_STORED).all()


def test_samples_without_a_file_need_nothing_and_are_remembered(tmp_path, recipe):
    lost = MediaError("7.mp4", "missing", "no such file")
    manifest, content = _content(tmp_path, recipe, failures={7: lost})
    work = _work(content, recipe, tmp_path)
    assert all(7 not in item.sample_ids for item in work if item.kind == "clips")
    index = make_index(manifest, recipe, content, read_catalog(tmp_path), {})
    assert [sample.sample_id for sample in failed_samples(index)] == [7]
    assert index.failures[-2 - index.clips[0][7, 0]] == ("missing", "no such file")
    assert (index.clips[0][6] == NOT_STORED).all()


def test_what_several_shards_hold_counts_once(tmp_path, recipe):
    _, content = _content(tmp_path, recipe)
    [item] = [item for item in _work(content, recipe, tmp_path) if item.bucket == 1]
    _do(tmp_path, recipe, item)
    other = dataclasses.replace(item, name="0" * 16)
    path = _do(tmp_path, recipe, other)
    catalog = read_catalog(tmp_path)
    assert len(catalog.shards) == 2
    assert len(catalog.keys) == item.num_items
    assert set(catalog.shard_of) == {catalog.shards.index(path.name)}, "the first by name"


def test_a_shard_whose_header_lies_is_left_out_and_named(tmp_path, recipe):
    _, content = _content(tmp_path, recipe)
    work = _work(content, recipe, tmp_path)
    paths = [_do(tmp_path, recipe, item) for item in work]
    raw = paths[1].read_bytes()
    paths[1].write_bytes(raw.replace(b'"crc32":"{', b'"crc32":"['))
    catalog = read_catalog(tmp_path)
    assert catalog.damaged.keys() == {paths[1].name}
    assert "is not that of a shard" in catalog.damaged[paths[1].name]
    assert [item.name for item in _work(content, recipe, tmp_path)] == [work[1].name]
    assert read_shard(tmp_path, paths[2].name).notes == {}
