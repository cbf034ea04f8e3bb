"""`longtake encode`: what it writes, what it leaves alone, and what survives a kill."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from longtake.data import Bucket
from longtake.data import source as data_source
from longtake.store import find_damage, read_index
from longtake.store.writer import ClipReader
from tests.processes import Processes
from tests.programs.runs import (
    longtake,
    longtake_in,
    make_clips,
    save_config,
    tiny_config,
    write_manifest,
)
from tests.programs.stores import (
    ONE_SAMPLE,
    SIDE,
    encode_and_crash,
    encode_here,
    encode_slowly,
    files_of,
    make_many_clips,
)

COUNT = 12


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return make_many_clips(tmp_path_factory.mktemp("many"), COUNT)


@pytest.fixture(scope="module")
def config(tmp_path_factory, many):
    return tiny_config(tmp_path_factory.mktemp("config"), many)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, config):
    """A store that was made in one go: its folder and all its files."""
    store = tmp_path_factory.mktemp("stores") / "undisturbed"
    assert encode_here(config, store, *ONE_SAMPLE) == 0
    return store, files_of(store)


def _shards(files):
    return {name: raw for name, raw in files.items() if name.startswith("shards/")}


def test_the_library_reads_what_encode_writes(undisturbed):
    _, files = undisturbed
    shards = _shards(files)
    assert len(shards) == COUNT + 1
    assert set(files) - set(shards) == {"store.json", next(n for n in files if "index-" in n)}
    captions, clips = [], 0
    for name in shards:
        with safe_open(undisturbed[0] / name, framework="pt") as file:
            assert file.metadata()["format"] == "longtake latent store 1"
            for tensor in map(file.get_tensor, file.keys()):
                assert tensor.dtype == torch.bfloat16
                if "text-" in name:
                    captions.append(len(tensor))
                else:
                    assert tensor.shape == (24, 4, 4, 4)
                    clips += 1
    assert clips == COUNT
    # Words, two more for the number, and the end.
    assert sorted(captions) == sorted(number % 5 + 3 for number in range(COUNT))


def test_again_there_is_nothing_to_do(undisturbed, config, capsys):
    store, files = undisturbed
    assert encode_here(config, store, *ONE_SAMPLE) == 0
    assert "to encode: 0 clips and 0 captions" in capsys.readouterr().out
    assert files_of(store) == files


def test_only_what_is_new_or_changed_is_encoded(tmp_path, config, many, undisturbed, capsys):
    store = tmp_path / "store"
    shutil.copytree(undisturbed[0], store)
    folder = tmp_path / "clips"
    shutil.copytree(many.parent, folder)
    rows = [json.loads(line) for line in many.read_text().splitlines()]
    rows[0]["caption"] = "another caption"
    (folder / "1.mp4").write_bytes((folder / "2.mp4").read_bytes())
    del rows[5]
    shutil.copy(folder / "3.mp4", folder / "again.mp4")
    rows.append({"path": "again.mp4", "caption": rows[3]["caption"], "label": 0})
    manifest = write_manifest(folder / "many.jsonl", rows)
    changed = replace(config, data=replace(config.data, manifest=str(manifest)))

    assert encode_here(changed, store, *ONE_SAMPLE) == 0
    out = capsys.readouterr().out
    # Clip 1 has become clip 2, "again" is clip 3: both are there. One caption is not.
    assert "to encode: 0 clips and 1 captions in 1 shards" in out
    index = read_index(store)
    assert len(index.manifest) == COUNT
    assert index.clips[0][1] == index.clips[0][2]
    assert index.clips[0][-1] == index.clips[0][3]

    wider = Bucket(num_frames=2, height=SIDE, width=SIDE)
    data = replace(changed.data, flip=True, buckets=(*changed.data.buckets, wider))
    assert encode_here(replace(changed, data=data), store, *ONE_SAMPLE) == 0
    # Eleven clips are different ones: their mirror images, and two sides of the new bucket.
    assert f"to encode: {10 * 3} clips and 0 captions" in capsys.readouterr().out

    other = replace(changed, video_encoder=replace(changed.video_encoder, dct_luma_channels=8))
    assert encode_here(other, store, *ONE_SAMPLE) == 0
    assert "to encode: 10 clips and 0 captions" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(tmp_path, config, capsys):
    assert encode_here(config, tmp_path / "store", "--dry-run") == 0
    assert f"to encode: {COUNT} clips and {COUNT} captions in 2 shards" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


def test_mistakes_are_named(tmp_path, config, many, capsys):
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied/precious.txt").touch()
    random_crop = replace(config, data=replace(config.data, crop="random"))
    for arguments, problem in (
        ((config, tmp_path / "occupied"), "is not a latent store: choose another --output"),
        ((config, tmp_path / "new", "--verify"), "--verify: .* is not a latent store"),
        ((config, tmp_path / "new", "--shard-mib", 0), "--shard-mib 0.0 must be above 0"),
        ((config, "s3://bucket/store"), "a store is filled on a file system; copy it to object"),
        ((random_crop, tmp_path / "new"), "crop=random is another crop every epoch"),
    ):
        assert encode_here(*arguments) == 2
        assert re.search(problem, capsys.readouterr().err), problem
    assert longtake("encode", "--config", save_config(config)).status == 2
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------- kills


def _kill_at_random(path, store, rng):
    """Kills a run some shards and a moment after its start; whether it was still at work."""

    def count():
        return len(list(store.glob("shards/*.safetensors")))

    wanted = count() + rng.randrange(4)
    with Processes(encode_slowly, 1, path, store, list(ONE_SAMPLE), 0.02) as run:
        while count() < wanted and run.exit_codes(0) == [None]:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        run.kill()
        return run.exit_codes() != [0]


@pytest.mark.parametrize(
    "kills", [4, pytest.param(20, marks=pytest.mark.slow)], ids=["a few", "twenty"]
)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, config, undisturbed, kills):
    path, store = save_config(config), tmp_path / "store"
    rng, killed, partial = random.Random(0), 0, 0
    while killed < kills:
        if _kill_at_random(path, store, rng):
            killed += 1
            partial += 0 < len(list(store.glob("shards/*.safetensors"))) <= COUNT
        else:
            assert files_of(store) == undisturbed[1]
            shutil.rmtree(store)  # it came to its end: from the beginning
    assert partial, "no kill fell between two shards"
    assert encode_here(config, store, *ONE_SAMPLE) == 0
    assert files_of(store) == undisturbed[1]


@pytest.mark.slow
def test_a_crash_before_any_change_to_the_disk_costs_one_shard_at_most(
    tmp_path, config, undisturbed, many
):
    rows = many.read_text().splitlines(keepends=True)[:3]
    few = many.with_name("few.jsonl")
    few.write_text("".join(rows))
    config = replace(config, name="few", data=replace(config.data, manifest=str(few)))
    path = save_config(config)
    assert encode_here(config, tmp_path / "whole", *ONE_SAMPLE) == 0
    expected, code, crash_at = files_of(tmp_path / "whole"), None, 0
    while code != 0:
        crash_at += 1
        store = tmp_path / str(crash_at)
        with Processes(encode_and_crash, 1, path, store, list(ONE_SAMPLE), crash_at) as run:
            [code] = run.exit_codes()
        assert code in (0, 9)
        complete = _shards(files_of(store))
        for name, raw in complete.items():
            assert name.endswith(".tmp") or expected[name] == raw, f"crash at change {crash_at}"
        assert encode_here(config, store, *ONE_SAMPLE) == 0
        assert files_of(store) == expected, f"crash at change {crash_at}"
    assert crash_at > 20


# ---------------------------------------------------------------------------------- several at once


def test_two_runs_at_once_share_the_work(tmp_path, config, undisturbed):
    path, store = save_config(config), tmp_path / "store"
    # Not the two processes of one run: both think that they are alone.
    with (
        Processes(encode_slowly, 1, path, store, list(ONE_SAMPLE), 0.05) as one,
        Processes(encode_slowly, 1, path, store, list(ONE_SAMPLE), 0.05) as other,
    ):
        counts = [*one.results(), *other.results()]
    assert sum(counts) == COUNT, "a clip was encoded twice, or not at all"
    assert files_of(store) == undisturbed[1]


def test_of_two_runs_one_is_killed_and_the_other_does_its_work(tmp_path, config, undisturbed):
    path, store = save_config(config), tmp_path / "store"
    with (
        Processes(encode_slowly, 1, path, store, list(ONE_SAMPLE), 0.05) as one,
        Processes(encode_slowly, 1, path, store, list(ONE_SAMPLE), 0.05) as other,
    ):
        one.wait_until(lambda: len(list(store.glob("shards/clips-*"))) >= 3)
        one.kill()
        assert 0 < other.results()[0] <= COUNT
    assert files_of(store) == undisturbed[1]


def test_two_manifests_may_fill_one_store(tmp_path, config, many, undisturbed):
    half = many.with_name("half.jsonl")
    half.write_text("".join(many.read_text().splitlines(keepends=True)[: COUNT // 2]))
    halved = replace(config, name="half", data=replace(config.data, manifest=str(half)))
    store = tmp_path / "store"
    with (
        Processes(encode_slowly, 1, save_config(config), store, list(ONE_SAMPLE), 0.05) as one,
        Processes(encode_slowly, 1, save_config(halved), store, ["--shard-mib", "1"], 0.05) as two,
    ):
        assert one.results()[0] + two.results()[0] >= COUNT
    # Whichever came last is the index now; a run of the other makes it its own.
    assert encode_here(config, store, *ONE_SAMPLE) == 0
    index = read_index(store)
    assert len(index.manifest) == COUNT
    assert (index.clips[0] >= 0).all()
    assert (index.text >= 0).all()
    assert encode_here(config, store, "--verify", "--dry-run") == 0


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_processes_of_one_run_make_the_store_of_one(tmp_path, config, undisturbed, world_size):
    store = tmp_path / "store"
    arguments = ["encode", "--config", save_config(config), "--output", store, *ONE_SAMPLE]
    outcomes = longtake_in(world_size, *arguments)
    assert [outcome.status for outcome in outcomes] == [0] * world_size, outcomes[0].err
    assert files_of(store) == undisturbed[1]
    assert f"{COUNT} clips and {COUNT} captions of {COUNT} samples" in outcomes[0].out
    assert not any(outcome.out for outcome in outcomes[1:])
    checked = longtake_in(world_size, *arguments, "--verify")
    assert "every byte is as it was written" in checked[0].out


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path, config, undisturbed):
    store = tmp_path / "store"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "longtake", "encode", "--output", store]
    done = subprocess.run(
        [*command, "--config", save_config(config), *ONE_SAMPLE],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert files_of(store) == undisturbed[1]


# ------------------------------------------------------------------------------- damage and repair


def _ways_to_damage(raw):
    """Places in a file whose bytes do different things, and a cut."""
    header = int.from_bytes(raw[:8], "little") if raw[8:9] == b"{" else 0
    for place in {0, 5, 9, header // 2, header + 7, header + 8, len(raw) // 2, len(raw) - 1}:
        yield (
            f"bit flipped in byte {place}",
            raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :],
        )
    for length in (0, 4, header, len(raw) - 1):
        yield f"cut to {length} bytes", raw[:length]
    yield "longer by a byte", raw + b"\0"
    yield "gone", None


def test_every_damage_to_every_file_is_named(tmp_path, undisturbed):
    store, files = tmp_path / "store", undisturbed[1]
    shutil.copytree(undisturbed[0], store)
    assert find_damage(store) == []
    for name, raw in files.items():
        for what, damaged in _ways_to_damage(raw):
            (store / name).unlink()
            if damaged is not None:
                (store / name).write_bytes(damaged)
            found = [damage.file for damage in find_damage(store)]
            assert found == [name], f"{name}, {what}: found {found}"
        (store / name).write_bytes(raw)


def test_verify_names_what_is_lost_and_encodes_it_again(tmp_path, config, undisturbed, capsys):
    store = tmp_path / "store"
    shutil.copytree(undisturbed[0], store)
    shards = sorted(_shards(undisturbed[1]))
    flipped, cut, gone, text = *shards[:3], shards[-1]
    raw = bytearray((store / flipped).read_bytes())
    raw[-3] ^= 16
    (store / flipped).write_bytes(raw)
    os.truncate(store / cut, 100)
    (store / gone).unlink()
    raw = bytearray((store / text).read_bytes())
    raw[20] ^= 1
    (store / text).write_bytes(raw)

    assert encode_here(config, store, *ONE_SAMPLE, "--verify", "--dry-run") == 1
    out = capsys.readouterr().out
    assert out.count("damaged: ") == 4
    for name, problem, lost in (
        (flipped, "its bytes are not those it was named after", "clips of 1 samples"),
        (cut, "its bytes are not those it was named after", "clips of 1 samples"),
        (gone, "is missing", "clips of 1 samples"),
        (text, "its bytes are not those it was named after", f"captions of {COUNT} samples"),
    ):
        [line] = [line for line in out.splitlines() if name in line]
        assert problem in line
        assert f"it held {lost}" in line
        assert ".mp4" in line
    assert (store / flipped).exists(), "a dry run moves nothing"

    assert encode_here(config, store, *ONE_SAMPLE, "--verify") == 0
    assert f"to encode: 3 clips and {COUNT} captions" in capsys.readouterr().out
    files = files_of(store)
    aside = {name for name in files if name.endswith(".damaged")}
    assert aside == {f"{name}.damaged" for name in (flipped, cut, text)}
    assert {name: raw for name, raw in files.items() if name not in aside} == undisturbed[1]
    assert encode_here(config, store, *ONE_SAMPLE, "--verify") == 0
    assert "every byte is as it was written" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["store.json", "index"])
def test_a_lost_index_is_made_again(tmp_path, config, undisturbed, name):
    store = tmp_path / "store"
    shutil.copytree(undisturbed[0], store)
    [path] = store.glob(f"{name}*")
    path.write_bytes(b"rubbish")
    assert encode_here(config, store, *ONE_SAMPLE) == 0
    assert files_of(store) == undisturbed[1]


def test_half_of_all_files_damaged_at_once(tmp_path, config, undisturbed, capsys):
    store = tmp_path / "store"
    shutil.copytree(undisturbed[0], store)
    rng = random.Random(1)
    names = rng.sample(sorted(undisturbed[1]), len(undisturbed[1]) // 2)
    for number, name in enumerate(names):
        raw = bytearray(undisturbed[1][name])
        place = rng.randrange(len(raw))
        raw[place] ^= 1 << rng.randrange(8)
        (store / name).write_bytes(raw if number % 2 else raw[:place])
    assert encode_here(config, store, *ONE_SAMPLE, "--verify", "--dry-run") == 1
    out = capsys.readouterr().out
    # What a broken index would have named is found all the same; only whose clips they were is not.
    assert all(f"damaged: {name}: " in out for name in names if name != "store.json"), out
    assert encode_here(config, store, *ONE_SAMPLE, "--verify") == 0
    files = {n: raw for n, raw in files_of(store).items() if not n.endswith(".damaged")}
    assert files == undisturbed[1]


# --------------------------------------------------------------------------------- hostile samples


@pytest.fixture
def hostile(tmp_path):
    """A manifest of three good clips and every kind of bad one."""
    folder = make_clips(tmp_path / "clips").parent
    (folder / "text.mp4").write_text("not a video\n" * 100)
    (folder / "empty.mp4").touch()
    (folder / "playlist.mp4").write_text("ffconcat version 1.0\nfile 'clip0.mp4'\n")
    (folder / "half.mp4").write_bytes((folder / "clip0.mp4").read_bytes()[:400])
    os.mkfifo(folder / "pipe.mp4")
    (tmp_path / "outside.mp4").write_bytes((folder / "clip0.mp4").read_bytes())
    (folder / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (folder / "folder.mp4").mkdir()
    expected = {
        "text.mp4": "unreadable",
        "empty.mp4": "empty",
        "playlist.mp4": "unreadable",
        "half.mp4": "unreadable",
        "pipe.mp4": "not_a_file",
        "link.mp4": "outside_root",
        "folder.mp4": "not_a_file",
        "absent.mp4": "missing",
        "short.mp4": "too_short",
    }
    shutil.copy(folder / "clip0.mp4", folder / "short.mp4")
    rows = [{"path": f"clip{k}.mp4", "caption": f"good {k}"} for k in range(3)]
    rows += [{"path": name, "caption": "bad"} for name in expected]
    rows[-1]["end"] = 0.2
    random.Random(0).shuffle(rows)
    return write_manifest(folder / "hostile.jsonl", rows), expected


@pytest.mark.parametrize("workers", [0, 2])
def test_hostile_clips_are_skipped_named_and_counted(tmp_path, hostile, workers, capsys):
    manifest, expected = hostile
    store = tmp_path / "store"
    config = tiny_config(tmp_path, manifest)
    config = replace(config, data=replace(config.data, num_workers=workers))
    assert encode_here(config, store) == 0
    out = capsys.readouterr().out
    assert "9 samples could not be encoded and will be replaced" in out
    for name, reason in expected.items():
        [line] = [line for line in out.splitlines() if f" {name} (line " in line]
        assert line.endswith(f"[{reason}]"), line
    assert "not_a_file: 2 samples" in out
    assert "5 samples have no readable file" in out
    assert "failed: 3 unreadable, 1 too_short" in out
    assert "holds 3 clips" in out

    assert encode_here(config, store) == 0
    out = capsys.readouterr().out
    assert "to encode: 0 clips" in out
    assert "9 samples could not be encoded" in out
    shutil.copy(manifest.parent / "clip1.mp4", manifest.parent / "absent.mp4")
    shutil.copy(manifest.parent / "clip2.mp4", manifest.parent / "text.mp4")
    assert encode_here(config, store, "--retry-failed") == 0
    out = capsys.readouterr().out
    # Both are copies of clips that are there; the rest is tried again, and fails.
    assert "to encode: 3 clips and 0 captions" in out
    assert "7 samples could not be encoded" in out


def test_a_clip_that_crashes_its_reader_costs_itself_alone(tmp_path, manifest, monkeypatch, capsys):
    read_clip = data_source.read_clip

    def crash(path, **options):
        if path.name == "clip1.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        return read_clip(path, **options)

    # The workers are forked from here.
    monkeypatch.setattr(data_source, "read_clip", crash)
    config = tiny_config(tmp_path, manifest)
    config = replace(config, data=replace(config.data, num_workers=2))
    assert encode_here(config, tmp_path / "store") == 0
    out = capsys.readouterr().out
    assert "holds 2 clips" in out
    [line] = [line for line in out.splitlines() if "clip1.mp4 (line 2)" in line]
    assert "crashed or hung its reader: data worker" in line
    assert line.endswith("[unreadable]")
    index = read_index(tmp_path / "store")
    assert (index.clips[0][:, 0] >= 0).tolist() == [True, False, True]


def test_a_worker_that_dies_between_clips_is_an_error(tmp_path, manifest, monkeypatch, capsys):
    """Nobody can be blamed, and trying for ever helps nobody."""
    monkeypatch.setattr(ClipReader, "__getitem__", lambda *given: os.kill(os.getpid(), 9))
    config = tiny_config(tmp_path, manifest)
    config = replace(config, data=replace(config.data, num_workers=1))
    assert encode_here(config, tmp_path / "store") == 1
    assert "while reading nothing (between two samples)" in capsys.readouterr().err
