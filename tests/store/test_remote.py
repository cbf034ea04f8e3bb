"""A store on object storage: fsspec's own in memory, and files named by URL for data workers."""

from __future__ import annotations

import itertools
import secrets
from dataclasses import replace

import fsspec
import pytest
import torch

from longtake.data import MediaError, View, build_loader
from longtake.store import StoreError, StoreSource, open_source
from tests.programs.runs import losses, run_folder, tiny_config, train
from tests.programs.stores import ONE_SAMPLE, encode_here, files_of, make_many_clips

COUNT = 5
URL = "memory://bucket/store"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    return tiny_config(folder, make_many_clips(folder / "clips", COUNT))


@pytest.fixture(scope="module")
def store(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("stores") / "store"
    assert encode_here(config, path, *ONE_SAMPLE) == 0
    return path


@pytest.fixture
def memory(store):
    """The store's files in memory; what was read of them, by name."""
    file_system = fsspec.filesystem("memory")
    for name, raw in files_of(store).items():
        file_system.pipe_file(f"/bucket/store/{name}", raw)
    yield file_system
    file_system.rm("/bucket", recursive=True)


def _take(config, source, steps):
    loader = build_loader(config.data, seed=7, source=source)
    return [batch for step in itertools.islice(loader, steps) for batch in step]


def _same(one, other):
    assert one.captions == other.captions
    for name in ("sample_ids_B", "mean_BCTHW", "embeds_BLK", "mask_BL"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_it_reads_as_from_a_disk(config, store, memory):
    here = StoreSource(store, config.data, with_text=True)
    there = open_source(config.data, URL + "/", with_text=True)
    assert isinstance(there, StoreSource)
    for one, other in zip(_take(config, here, 4), _take(config, there, 4), strict=True):
        _same(one, other)


def test_an_entry_is_one_range_request(config, memory, monkeypatch):
    source = StoreSource(URL, config.data, with_text=True)
    asked = []
    cat_file = type(memory).cat_file

    def note(self, path, start=None, end=None, **options):
        asked.append((path.split("/")[-1].split("-")[0], end - start))
        return cat_file(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(memory), "cat_file", note)
    source.read(3, 0, View())
    # 24 channels of 4 x 4 x 4 latents in bf16; six tokens of 16 channels.
    assert asked == [("clips", 24 * 64 * 2), ("text", 6 * 16 * 2)]


def test_what_is_damaged_or_gone_is_a_bad_sample(config, memory):
    source = StoreSource(URL, config.data, with_text=True)
    entries = source.index.entries
    for sample_id, change in ((1, "flip"), (2, "cut"), (3, "remove")):
        row = source.index.clips[0][sample_id, 0]
        path = f"/bucket/store/shards/{entries.shards[entries.shard_of[row]]}"
        raw = bytearray(memory.cat_file(path))
        if change == "remove":
            memory.rm(path)
        else:
            raw[-1] ^= 1
            memory.pipe_file(path, bytes(raw[: -9 if change == "cut" else None]))
    for sample_id, problem in ((1, "damaged in"), (2, "damaged in"), (3, "cannot be read")):
        with pytest.raises(MediaError, match=problem):
            source.read(sample_id, 0, View())
    assert source.read(0, 0, View()).mean_CTHW is not None


def test_data_workers_open_it_themselves(config, store):
    data = replace(config.data, num_workers=2)
    here = _take(config, StoreSource(store, config.data, with_text=True), 3)
    there = StoreSource(f"file://{store}", data, with_text=True)
    for one, other in zip(here, _take(replace(config, data=data), there, 3), strict=True):
        _same(one, other)


def test_a_run_trains_from_a_url(config, store):
    runs = {}
    for name, manifest in (("disk", str(store)), ("url", f"file://{store}")):
        run = replace(config, name=name, data=replace(config.data, manifest=manifest))
        train(run)
        runs[name] = losses(run_folder(run))
    assert runs["url"] == runs["disk"]


@pytest.mark.parametrize(
    ("url", "error", "problem"),
    [
        ("memory://bucket/nothing", StoreError, r"nothing/store.json cannot be read \(FileNotF"),
        ("gopher://host/store", StoreError, "gopher://host/store: no protocol 'gopher'"),
    ],
)
def test_what_cannot_be_reached_is_named(config, url, error, problem):
    with pytest.raises(error, match=problem):
        open_source(config.data, url, with_text=True)


@pytest.fixture
def bucket(store, monkeypatch):
    """The store in a bucket of an S3 server of this process."""
    import s3fs
    from moto import server

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "nobody")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        file_system = s3fs.S3FileSystem(skip_instance_cache=True)
        name = f"clips-{secrets.token_hex(4)}"  # the server keeps all buckets of a process
        file_system.mkdir(name)
        file_system.put(f"{store}/", f"{name}/store", recursive=True)
        yield f"s3://{name}/store"
    finally:
        running.stop()


@pytest.mark.services
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bucket_is_read_as_a_disk(config, store, bucket, num_workers):
    data = replace(config.data, num_workers=num_workers)
    here = _take(config, StoreSource(store, config.data, with_text=True), 3)
    there = open_source(data, bucket, with_text=True)
    for one, other in zip(here, _take(replace(config, data=data), there, 3), strict=True):
        _same(one, other)
    with pytest.raises(StoreError, match=r"nothing/store\.json cannot be read"):
        open_source(data, f"{bucket}/nothing", with_text=True)
