"""A store as the loader's source: same samples, same order, same draws as from the files."""

import itertools
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from longtake.data import (
    Bucket,
    LoaderState,
    MediaError,
    MediaSource,
    View,
    build_loader,
    open_manifest,
    validation_batches,
)
from longtake.encoders import build_text_encoder, build_video_encoder
from longtake.pipeline import encode_batch
from longtake.store import StoreError, StoreSource, open_source
from longtake.store import reader as store_reader
from longtake.store.index import read_index, write_index
from longtake.store.reader import padded_length
from tests.programs.runs import tiny_config
from tests.programs.stores import ONE_SAMPLE, SIDE, encode_here, make_many_clips

CPU = torch.device("cpu")
COUNT = 7


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two buckets, three places, both sides."""
    folder = tmp_path_factory.mktemp("many")
    config = tiny_config(folder, make_many_clips(folder, COUNT, num_frames=9))
    buckets = (
        Bucket(num_frames=4, height=SIDE, width=SIDE, batch_size=4),
        Bucket(num_frames=1, height=SIDE // 2, width=SIDE, batch_size=4),
    )
    return replace(config, data=replace(config.data, buckets=buckets, flip=True, clip_places=3))


@pytest.fixture(scope="module")
def store(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("stores") / "store"
    assert encode_here(config, path, *ONE_SAMPLE) == 0
    return path


def _take(config, source, steps, **options):
    loader = build_loader(config.data, seed=7, source=source, **options)
    return [batch for step in itertools.islice(loader, steps) for batch in step]


def _from_store(config, store, steps, **options):
    return _take(config, StoreSource(store, config.data, with_text=True), steps, **options)


def _rows(batches):
    """Every sample with all that belongs to it; padding left out."""
    rows = []
    for batch in batches:
        for k in range(len(batch.captions)):
            length = int(batch.mask_BL[k].sum())
            rows.append(
                (
                    (batch.bucket, int(batch.epochs_B[k]), int(batch.sample_ids_B[k])),
                    (batch.captions[k], int(batch.labels_B[k])),
                    batch.mean_BCTHW[k].float().numpy().tobytes(),
                    batch.embeds_BLK[k, :length].float().numpy().tobytes(),
                )
            )
    return rows


def test_it_gives_what_encoding_the_files_gives(config, store):
    encoders = {
        "video_encoder": build_video_encoder(config.video_encoder, "cpu"),
        "text_encoder": build_text_encoder(config.text_encoder, "cpu"),
    }
    live = _take(config, MediaSource(config.data, open_manifest(config.data)), 12)
    kept = _from_store(config, store, 12)
    assert {batch.bucket for batch in live} == {0, 1}
    for one, other in zip(live, kept, strict=True):
        assert one.bucket == other.bucket
        assert one.captions == other.captions
        assert one.pixel_size == other.pixel_size
        for name in ("labels_B", "epochs_B", "sample_ids_B", "weights_B"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        stats = encoders["video_encoder"].encode(one.pixels_BCTHW.float() / 127.5 - 1)
        # bf16 keeps 8 bits: half a unit in the last place.
        torch.testing.assert_close(
            other.mean_BCTHW.float(), stats.mean_BCTHW, rtol=2**-8, atol=1e-6
        )
        prompt = encoders["text_encoder"].encode(one.captions)
        length = other.mask_BL.shape[1]
        assert torch.equal(other.mask_BL, prompt.mask_BL[:, :length])
        assert not prompt.mask_BL[:, length:].any()
        assert torch.equal(other.embeds_BLK, prompt.embeds_BLK[:, :length].bfloat16())
        inputs = [encode_batch(b, **encoders, seed=7, device=CPU) for b in (one, other)]
        assert inputs[0].pixel_size == inputs[1].pixel_size
        assert inputs[1].clean_BCTHW.dtype == torch.float32
        torch.testing.assert_close(
            inputs[1].clean_BCTHW, inputs[0].clean_BCTHW, rtol=2**-8, atol=1e-5
        )


def test_processes_workers_and_resuming_change_nothing(config, store):
    one = _rows(_from_store(config, store, 6))
    assert len({row[0] for row in one}) == len(one) == 24
    halves = [_from_store(config, store, 6, dp_rank=rank, dp_size=2) for rank in range(2)]
    assert _rows(b for pair in zip(*halves, strict=True) for b in pair) == one
    assert _rows(_from_store(config, store, 6, micro_batches=4)) == one
    with_workers = replace(config, data=replace(config.data, num_workers=2))
    assert _rows(_from_store(with_workers, store, 6)) == one
    loader = build_loader(
        config.data, seed=7, source=StoreSource(store, config.data, with_text=True)
    )
    for _ in itertools.islice(loader, 2):
        pass
    place = LoaderState.from_json(loader.state.to_json())
    assert _rows(_from_store(config, store, 4, start=place)) == one[8:]


def test_a_run_may_take_less_than_the_store_has(config, store):
    data = replace(config.data, buckets=config.data.buckets[1:], flip=False, clip_position="start")
    source = StoreSource(store, data, with_text=False)
    clips = [source.read(3, 0, View(position=p)).mean_CTHW for p in (0.0, 0.5, 0.99)]
    whole = StoreSource(store, config.data, with_text=True)
    assert torch.equal(clips[0], whole.read(3, 1, View()).mean_CTHW)
    assert not torch.equal(clips[0], whole.read(3, 1, View(flip=True)).mean_CTHW)
    assert len({clip.float().numpy().tobytes() for clip in clips}) == 3
    [batch] = _take(replace(config, data=data), source, 1)
    assert batch.embeds_BLK is None
    labels = encode_batch(
        batch,
        video_encoder=build_video_encoder(config.video_encoder, "cpu"),
        text_encoder=None,
        seed=0,
        device=CPU,
    ).condition
    assert labels.keys() == {"labels_B"}


def test_held_out_samples_are_read_in_order_and_padded(config, store):
    source = open_source(config.data, str(store), with_text=True)
    batches = list(validation_batches(config.data, source, batch_size=4))
    assert [batch.weights_B.tolist() for batch in batches] == [[1] * 4, [1, 1, 1, 0]]
    ids = torch.cat([batch.sample_ids_B for batch in batches]).tolist()
    assert ids == [*range(COUNT), COUNT - 1]
    assert not batches[1].mean_BCTHW[3].any()
    assert batches[1].mask_BL[3].sum() == 1, "attention to no token at all is not defined"
    assert torch.equal(batches[0].mean_BCTHW[2], source.read(2, 0, View()).mean_CTHW)


def _damage(store, folder):
    copy = folder / "copy"
    shutil.copytree(store, copy)
    return copy


def test_damaged_samples_are_replaced_the_same_way_everywhere(tmp_path, config, store):
    copy = _damage(store, tmp_path)
    data = replace(config.data, buckets=config.data.buckets[:1], max_bad_fraction=1.0)
    config = replace(config, data=data)
    whole = StoreSource(store, data, with_text=True)
    entries = whole.index.entries
    # One clip with a flipped bit, one cut off, one whose shard is gone.
    victims = {1: "corrupt", 3: "corrupt", 5: "unreadable"}
    for sample_id in victims:
        row = whole.index.clips[0][sample_id, 0]
        path = copy / "shards" / entries.shards[entries.shard_of[row]]
        if sample_id == 1:
            raw = bytearray(path.read_bytes())
            for variant in range(6):
                begin = entries.begins[whole.index.clips[0][1, variant]]
                raw[begin + 100] ^= 1
            path.write_bytes(raw)
        elif sample_id == 3:
            os.truncate(path, int(entries.begins[whole.index.clips[0][3]].min()) + 8)
        else:
            path.unlink()
    batches = _from_store(config, copy, 7)
    assert _rows(_from_store(config, copy, 7)) == _rows(batches)
    halves = [_from_store(config, copy, 7, dp_rank=rank, dp_size=2) for rank in range(2)]
    assert _rows(b for pair in zip(*halves, strict=True) for b in pair) == _rows(batches)
    bad = {sample.sample_id: sample for batch in batches for sample in batch.bad}
    assert {sample_id: sample.reason for sample_id, sample in bad.items()} == victims
    assert "damaged in shard clips-" in bad[1].text
    assert "--verify" in bad[1].text
    assert "cannot be read" in bad[5].text
    good = [
        whole.read(k, 0, View(position=place / 2, flip=flip)).mean_CTHW.float().numpy().tobytes()
        for k in set(range(COUNT)) - set(victims)
        for place in range(3)
        for flip in (False, True)
    ]
    assert {row[2] for row in _rows(batches)} <= set(good)


def test_what_was_not_encoded_says_why(tmp_path, config, store):
    source = StoreSource(store, config.data, with_text=True)
    rows = source.index.clips[0] = source.index.clips[0].copy()
    rows[2] = -1
    with pytest.raises(MediaError, match=r"2\.mp4: not in the latent store .* run longtake encode"):
        source.read(2, 0, View())


def test_only_whole_stores_of_this_format_are_opened(tmp_path, config, store):
    copy = _damage(store, tmp_path)
    [index] = copy.glob("index-*")
    header = copy / "store.json"
    text = header.read_text()
    raw = index.read_bytes()
    index.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(StoreError, match="its bytes are not those it was named after"):
        open_source(config.data, str(copy), with_text=True)
    index.unlink()
    with pytest.raises(StoreError, match="no such file"):
        open_source(config.data, str(copy), with_text=True)
    for wrong, problem in (
        (text.replace('"places": 3', '"places": 4'), "does not have the checksum"),
        ("{}", "cannot be read"),
        (text[:50], "cannot be read"),
    ):
        header.write_text(wrong)
        with pytest.raises(StoreError, match=problem):
            open_source(config.data, str(copy), with_text=True)
    header.unlink()
    with pytest.raises(StoreError, match="not been finished: run longtake encode once more"):
        open_source(config.data, str(copy), with_text=True)


def test_an_index_that_points_elsewhere_is_refused(tmp_path, config, store):
    copy = _damage(store, tmp_path)
    index = read_index(copy)
    entries = index.entries

    def changed(array, place, value):
        array = np.array(array)
        array[place] = value
        return array

    for wrong in (
        replace(index, entries=replace(entries, shard_of=changed(entries.shard_of, 0, 10**6))),
        replace(index, entries=replace(entries, begins=changed(entries.begins, 0, -1))),
        replace(index, entries=replace(entries, begins=changed(entries.begins, 0, 2**62))),
        replace(index, entries=replace(entries, sizes=changed(entries.sizes, 0, 2**62))),
        replace(index, entries=replace(entries, shards=["../../x"] * len(entries.shards))),
        replace(index, text=changed(index.text, 0, 10**6)),
        replace(index, clips=[changed(index.clips[0], (0, 0), -9), index.clips[1]]),
        replace(index, clips=[index.clips[0][:, :2], index.clips[1]]),
    ):
        write_index(copy, wrong)
        with pytest.raises(StoreError, match="is not the index of a latent store"):
            read_index(copy)


def test_text_is_padded_to_one_of_few_lengths():
    for max_tokens in (1, 8, 24, 120, 512):
        lengths = {padded_length(n, max_tokens) for n in range(1, max_tokens + 1)}
        assert len(lengths) <= 8
        assert max(lengths) == max_tokens
        assert all(
            n <= padded_length(n, max_tokens) <= max_tokens for n in range(1, max_tokens + 1)
        )
    assert padded_length(17, 120) == 32
    assert padded_length(115, 120) == 120


def test_it_survives_the_way_to_a_worker_that_is_not_forked(config, store):
    source = StoreSource(store, config.data, with_text=True)
    sent = pickle.dumps(source)
    assert len(sent) < 10_000, "the index travels"
    again = pickle.loads(sent)
    assert torch.equal(again.read(4, 0, View()).mean_CTHW, source.read(4, 0, View()).mean_CTHW)
    assert list(pickle.loads(pickle.dumps(source.manifest)).texts["path"]) == list(
        source.manifest.texts["path"]
    )


def test_open_files_are_few(config, store, monkeypatch):
    monkeypatch.setattr(store_reader, "_OPEN_FILES", 2)
    source = StoreSource(store, config.data, with_text=True)
    before = len(os.listdir("/proc/self/fd"))
    for sample_id in range(COUNT):
        source.read(sample_id, 0, View())
    assert len(os.listdir("/proc/self/fd")) <= before + 2
