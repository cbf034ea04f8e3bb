"""A latent store with a budget: what it keeps, and training from it and the files together."""

import json
import random
import re
import shutil
import signal
import time
from dataclasses import replace

import pytest

from longtake.store import read_index
from longtake.store.index import NOT_STORED
from tests.processes import Processes
from tests.programs.runs import (
    assert_same_bits,
    longtake,
    longtake_in,
    losses,
    numbers,
    run_folder,
    save_config,
    tiny_config,
    train,
)
from tests.programs.stores import (
    ONE_SAMPLE,
    encode_here,
    encode_slowly,
    files_of,
    make_many_clips,
    real_encoders_config,
)

COUNT = 12


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return make_many_clips(tmp_path_factory.mktemp("many"), COUNT)


@pytest.fixture(scope="module")
def config(tmp_path_factory, many):
    return tiny_config(tmp_path_factory.mktemp("config"), many)


@pytest.fixture(scope="module")
def everything(tmp_path_factory, config):
    store = tmp_path_factory.mktemp("stores") / "everything"
    assert encode_here(config, store, *ONE_SAMPLE) == 0
    return files_of(store)


def _encode(config, store, budget, capsys, *arguments):
    capsys.readouterr()
    status = encode_here(config, store, *ONE_SAMPLE, "--disk-budget", budget, *arguments)
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def _kept(store):
    index = read_index(store)
    return int((index.clips[0] >= 0).sum()), int((index.text >= 0).sum())


def _size(store):
    return sum(map(len, files_of(store).values()))


def _clips(files):
    """Shards of clips; those of captions are smaller in a small budget."""
    return {name: raw for name, raw in files.items() if name.startswith("shards/clips-")}


def test_a_budget_keeps_a_part_and_grows_and_shrinks(tmp_path, config, everything, capsys):
    store = tmp_path / "store"
    kept = []
    for budget in (60_000, 80_000, 70_000, 60_000):
        out = _encode(config, store, f"{budget}B", capsys)
        assert _size(store) <= budget
        kept.append(_kept(store)[0])
        assert f"clips 4x32x32: {kept[-1]} of {COUNT} kept" in out
        assert ("removed, being worth least" in out) == (len(kept) > 2)
        # What is kept is what a store of everything has.
        assert _clips(files_of(store)).items() <= _clips(everything).items()
        assert _encode(config, store, f"{budget}B", capsys).startswith("disk budget")
        assert _kept(store)[0] == kept[-1], "again there is nothing to do"
    assert 0 < kept[0] < kept[1] < COUNT or kept[1] == COUNT
    assert kept[0] <= kept[2] <= kept[1]
    assert kept[3] <= kept[2]
    index = read_index(store)
    assert index.facts["disk_budget"] == 60_000
    assert (index.clips[0] == NOT_STORED).any()

    out = _encode(config, store, "1GB", capsys)
    assert "break-even: a training step asks for" in out
    assert re.search(r"wins after [\d,]+ steps of 4 samples, [\d.,]+ epochs", out)
    assert _kept(store) == (COUNT, COUNT)
    assert encode_here(config, store, *ONE_SAMPLE) == 0
    assert "disk_budget" not in read_index(store).facts
    assert _clips(files_of(store)) == _clips(everything)


def test_what_is_worth_more_is_kept_first(tmp_path, config, capsys):
    """Rates that were found decide, not the order in which things are encoded."""
    counts = []
    for clip, caption in ((1.0, 1e-6), (1e-6, 1.0)):
        store = tmp_path / f"{clip}"
        _encode(config, store, "60000B", capsys)
        document = json.loads((store / "rates.json").read_text())
        for name, rate in document["rates"].items():
            rate["seconds"] = clip if name.startswith("clips") else caption
        shutil.rmtree(store)
        store.mkdir()
        (store / "shards").mkdir()
        from longtake.store.index import checksum_of

        document["crc32"] = checksum_of(document["rates"])
        (store / "rates.json").write_text(json.dumps(document))
        _encode(config, store, "60000B", capsys)
        counts.append(_kept(store))
    assert counts[0][0] > counts[1][0]
    assert counts[0][1] == 0 or counts[0][0] == COUNT
    assert counts[1][1] == COUNT


def test_a_dry_run_of_a_budget_changes_nothing(tmp_path, config, capsys):
    store = tmp_path / "store"
    out = _encode(config, store, "60kB", capsys, "--dry-run")
    assert not store.exists()
    assert "room for" in out
    _encode(config, store, "80kB", capsys)
    before = files_of(store)
    out = _encode(config, store, "60kB", capsys, "--dry-run")
    assert "would be removed" in out
    assert files_of(store) == before


def test_what_no_sample_needs_any_more_makes_room(tmp_path, config, many, capsys):
    store = tmp_path / "store"
    _encode(config, store, "1GB", capsys)
    used = _size(store)
    other = many.with_name("other.jsonl")
    rows = [json.loads(line) for line in many.read_text().splitlines()]
    other.write_text("".join(json.dumps(row | {"start": 0.01}) + "\n" for row in rows))
    moved = replace(config, name="moved", data=replace(config.data, manifest=str(other)))
    out = _encode(moved, store, f"{used + 20_000}B", capsys)
    assert "removed, being worth least" in out
    assert _kept(store)[0] > 0
    assert _size(store) <= used + 20_000


def test_budgets_that_make_no_sense_are_explained(tmp_path, config, capsys):
    for budget, problem in (
        ("2", "--disk-budget='2' has no unit: did you mean 2GB?"),
        ("1kB", "--disk-budget 1.0 kB is less than the index of 12 samples may take"),
    ):
        arguments = [*ONE_SAMPLE, "--disk-budget", budget]
        assert encode_here(config, tmp_path / "store", *arguments) == 2
        assert problem in capsys.readouterr().err


def test_damaged_rates_are_named_and_measured_again(tmp_path, config, capsys):
    store = tmp_path / "store"
    _encode(config, store, "80kB", capsys)
    before = _kept(store)
    path = store / "rates.json"
    path.write_text(path.read_text().replace("seconds", "sekonds", 1))
    assert encode_here(config, store, "--verify", "--dry-run") == 1
    assert "damaged: rates.json: is damaged" in capsys.readouterr().out
    _encode(config, store, "80kB", capsys)
    assert encode_here(config, store, "--verify", "--dry-run") == 0
    assert sum(_kept(store)) >= min(before)


# ----------------------------------------------------------------------------- kills and processes


def test_killed_at_random_moments_it_keeps_the_same(tmp_path, config, capsys):
    whole = tmp_path / "whole"
    _encode(config, whole, "75kB", capsys)
    rng, path, store = random.Random(3), save_config(config), tmp_path / "store"
    arguments = [*ONE_SAMPLE, "--disk-budget", "75kB"]
    store.mkdir()
    (store / "shards").mkdir()
    shutil.copy(whole / "rates.json", store)  # or both would measure, and might differ
    for _ in range(4):
        count = len(list(store.glob("shards/*.safetensors")))
        with Processes(encode_slowly, 1, path, store, arguments, 0.02) as run:
            while len(list(store.glob("shards/*.safetensors"))) <= count:
                if run.exit_codes(0) != [None]:
                    break
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
            run.kill()
        assert _size(store) <= 75_000
    _encode(config, store, "75kB", capsys)
    assert files_of(store) == files_of(whole)


def test_several_processes_never_keep_too_much(tmp_path, config, capsys):
    whole = tmp_path / "whole"
    _encode(config, whole, "75kB", capsys)
    store = tmp_path / "store"
    store.mkdir()
    (store / "shards").mkdir()
    shutil.copy(whole / "rates.json", store)
    arguments = ["encode", "--config", save_config(config), "--output", store, *ONE_SAMPLE]
    outcomes = longtake_in(2, *arguments, "--disk-budget", "75kB")
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].err
    assert files_of(store) == files_of(whole)


# ---------------------------------------------------------------------------------------- training


STEPS = 6


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return real_encoders_config(tmp_path_factory.mktemp("real"), clips=7, steps=STEPS)


@pytest.fixture(scope="module")
def online(real):
    outcome = train(real)
    return run_folder(real), outcome.batches


def _partial_store(real, budget):
    """A store that lacks some clips and some captions, whatever the machine's rates are."""
    store = run_folder(real).parent.parent / f"store-{budget}"
    arguments = ["--shard-mib", "0.02", "--disk-budget", budget]
    encoded = longtake("encode", "--config", save_config(real), "--output", store, *arguments)
    assert encoded.status == 0, encoded.err
    return store


@pytest.fixture(scope="module")
def mixed(real):
    store = _partial_store(real, "110kB")
    index = read_index(store)
    rows = [index.text[:, None], *index.clips]
    assert any((part == NOT_STORED).any() for part in rows)
    assert any((part >= 0).any() for part in rows)
    return replace(real, name="mixed", data=replace(real.data, store=str(store)))


@pytest.fixture(scope="module")
def straight(mixed):
    outcome = train(mixed)
    return run_folder(mixed), outcome.batches


def test_a_mix_is_the_run_that_encodes_everything_on_line(online, mixed, straight):
    assert straight[1] == online[1]
    # As from a store of everything: last bits may differ where a sum depends on the batch.
    assert losses(straight[0]) == pytest.approx(losses(online[0]), rel=1e-5)
    record = json.loads((straight[0] / "run.json").read_text())
    assert record["data"]["manifest"].endswith("many.jsonl")
    assert record["data"]["store"]["path"] == mixed.data.store


@pytest.mark.parametrize("lacking", ["clips", "captions", "everything"])
def test_whatever_is_lacking_is_encoded(real, online, mixed, tmp_path, lacking):
    """All of one kind, or all there is."""
    from longtake.store import write_index

    store = tmp_path / "store"
    whole = longtake("encode", "--config", save_config(real), "--output", store)
    assert whole.status == 0, whole.err
    index = read_index(store)
    nothing = [rows.copy() for rows in index.clips]
    text = index.text.copy()
    if lacking != "captions":
        for rows in nothing:
            rows[rows >= 0] = NOT_STORED
    if lacking != "clips":
        text[:] = NOT_STORED
    write_index(store, replace(index, clips=nothing, text=text))
    config = replace(
        real,
        name=f"no-{lacking}",
        output=str(tmp_path / "runs"),
        data=replace(real.data, store=str(store)),
    )
    outcome = train(config)
    assert outcome.batches == online[1]
    assert losses(run_folder(config)) == pytest.approx(losses(online[0]), rel=1e-5)


def test_two_processes_train_a_mix_alike(mixed, straight):
    config = replace(mixed, name="on-2")
    outcomes = longtake_in(2, "train", "--config", save_config(config))
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].err
    for step, batch in straight[1].items():
        assert [key for outcome in outcomes for key in outcome.batches[step]] == batch
    assert losses(run_folder(config)) == pytest.approx(losses(straight[0]), rel=1e-5)


def test_a_mix_that_was_stopped_ends_bit_identical(mixed, straight):
    config = replace(mixed, name="stopped")
    stopped = longtake("train", "--config", save_config(config), signal_at=(2, int(signal.SIGTERM)))
    assert stopped.status == 75, stopped.err
    # With workers: what the store lacks is decoded there.
    finished = train(replace(config, data=replace(config.data, num_workers=2)))
    assert "resumed from" in finished.err
    assert_same_bits(run_folder(config), straight[0])
    assert numbers(run_folder(config)) == numbers(straight[0])


@pytest.mark.parametrize("lacks_captions", [True, False])
def test_a_sharded_text_encoder_is_refused_where_some_captions_lack(
    mixed, straight, tmp_path, lacks_captions
):
    """A process whose captions are all there would not meet the others in its collectives."""
    from longtake.store import write_index

    store = tmp_path / "store"
    shutil.copytree(mixed.data.store, store)
    index = read_index(store)
    assert (index.text >= 0).all(), "this budget leaves clips out only"
    if lacks_captions:
        text = index.text.copy()
        text[0] = NOT_STORED
        write_index(store, replace(index, text=text))
    config = replace(
        mixed,
        name="sharded",
        output=str(tmp_path / "runs"),
        data=replace(mixed.data, store=str(store)),
        text_encoder=replace(mixed.text_encoder, placement="sharded"),
    )
    outcomes = longtake_in(2, "train", "--config", save_config(config))
    if lacks_captions:
        assert [outcome.status for outcome in outcomes] == [2, 2]
        assert "placement=sharded needs all processes in every step" in outcomes[0].err
    else:
        assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].err
        assert losses(run_folder(config)) == pytest.approx(losses(straight[0]), rel=1e-5)


def test_mixes_that_do_not_fit_are_refused(real, mixed, tmp_path):
    store = mixed.data.store
    refused = replace(real, name="refused", output=str(tmp_path / "runs"))
    other = make_many_clips(tmp_path / "clips", 3)
    for change, problem in (
        ({"manifest": store}, "holds only a part of its samples: give the manifest"),
        ({"manifest": store, "store": store}, "is a latent store itself: give the manifest of"),
        ({"store": str(tmp_path)}, "is not a latent store: make one with longtake encode"),
        ({"manifest": str(other), "store": store}, "is not the manifest that the latent store"),
        ({"store": store, "frame_interval": 2}, "data.frame_interval=2, but the latent store"),
    ):
        config = replace(refused, data=replace(real.data, **change))
        outcome = longtake("train", "--config", save_config(config))
        assert outcome.status == 2, outcome.err
        assert problem in outcome.err
    seeded = replace(refused, seed=1, data=mixed.data)  # other random weights
    outcome = longtake("train", "--config", save_config(seeded))
    assert outcome.status == 2, outcome.err
    assert "another video encoder than the latent store was encoded with" in outcome.err
