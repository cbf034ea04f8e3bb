"""`longtake train` on a latent store: the same run as from the files, on any processes, resumed."""

import json
import shutil
import signal
from dataclasses import replace

import pytest

from longtake.config import TrainConfig, ValidationConfig
from longtake.encoders import VideoEncoderConfig
from tests.programs.conftest import TINY_VAE
from tests.programs.runs import (
    assert_same_bits,
    labelled,
    longtake,
    longtake_in,
    losses,
    numbers,
    run_folder,
    save_config,
    tiny_config,
    train,
)
from tests.programs.stores import files_of, real_encoders_config

STEPS = 6
COUNT = 7


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return real_encoders_config(tmp_path_factory.mktemp("real"), clips=COUNT, steps=STEPS)


@pytest.fixture(scope="module")
def store(config):
    """Written by two processes."""
    path = run_folder(config).parent.parent / "store"
    outcomes = longtake_in(2, "encode", "--config", save_config(config), "--output", path)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].err
    return path


@pytest.fixture(scope="module")
def cached(config, store):
    """The same run, from the store."""
    return replace(config, name="cached", data=replace(config.data, manifest=str(store)))


@pytest.fixture(scope="module")
def straight(cached):
    """Trained without a stop: its folder and its batches."""
    outcome = train(cached)
    return run_folder(cached), outcome.batches


def test_two_processes_write_the_store_of_one(tmp_path, config, store):
    alone = longtake("encode", "--config", save_config(config), "--output", tmp_path / "alone")
    assert alone.status == 0, alone.err
    assert files_of(tmp_path / "alone") == files_of(store)


def test_it_is_the_run_that_encodes_on_line(config, straight):
    folder, batches = straight
    live = train(config)
    assert live.batches == batches
    # The encoders compute in bf16, so the store rounds nothing. Last bits may differ where a sum
    # depends on the batch that a clip was encoded in; on most machines none does.
    assert losses(folder) == pytest.approx(losses(run_folder(config)), rel=1e-5)


def test_no_encoder_is_built(cached, tmp_path, monkeypatch):
    outcome = train(replace(cached, name="bare", train=TrainConfig(steps=1)), before=_forbid)
    assert outcome.batches.keys() == {1}
    record = json.loads((run_folder(replace(cached, name="bare")) / "run.json").read_text())
    assert record["encoders"]["random"] is True
    assert record["encoders"]["video"]["class"] == "AutoencoderKL"
    assert len(record["encoders"]["text"]["weights_sample_sha256"]) == 64
    assert record["data"]["samples"] == COUNT
    assert record["data"]["manifest"].endswith("store/store.json")


def _forbid():
    from longtake.encoders import diffusers_vae, t5

    def refuse(*args, **kwargs):
        raise AssertionError("an encoder was built")

    diffusers_vae.load_diffusers_vae = t5.load_t5 = refuse


@pytest.mark.slow
def test_stopped_and_killed_it_ends_bit_identical(cached, straight):
    config = replace(cached, name="stopped")
    path = save_config(config)
    stopped = longtake("train", "--config", path, signal_at=(2, int(signal.SIGTERM)))
    assert stopped.status == 75, stopped.err
    # Workers read ahead of the step they are stopped at.
    finished = train(replace(config, data=replace(config.data, num_workers=2)))
    assert "resumed from" in finished.err
    assert_same_bits(run_folder(config), straight[0])
    assert numbers(run_folder(config)) == numbers(straight[0])
    assert {**stopped.batches, **finished.batches} == straight[1]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_trains_the_same(cached, straight, world_size):
    config = replace(cached, name=f"on-{world_size}")
    outcomes = longtake_in(world_size, "train", "--config", save_config(config))
    assert [outcome.status for outcome in outcomes] == [0] * world_size, outcomes[0].err
    for step, batch in straight[1].items():
        together = [key for outcome in outcomes for key in outcome.batches[step]]
        assert together == batch
    assert losses(run_folder(config)) == pytest.approx(losses(straight[0]), rel=1e-5)


def test_resumed_on_another_number_of_processes(cached, straight):
    config = replace(cached, name="moved")
    (run_folder(config) / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(straight[0] / name, run_folder(config))
    checkpoint = "checkpoints/step-4"
    shutil.copytree(straight[0] / checkpoint, run_folder(config) / checkpoint)
    outcomes = longtake_in(2, "train", "--config", save_config(config))
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].err
    assert outcomes[0].batches.keys() == {5, 6}
    assert losses(run_folder(config)) == pytest.approx(losses(straight[0]), rel=1e-5)


def test_samples_and_held_out_losses_come_as_ever(config, cached, store, manifest, tmp_path):
    """Sampling builds the real encoders, and validation reads a store or a manifest."""
    folder = tmp_path / "run"
    folder.mkdir()
    changed = {}
    for name, base, held_out in (
        ("live", config, config.data.manifest),
        ("kept", cached, str(store)),
        ("mixed", cached, config.data.manifest),
    ):
        run = replace(
            base,
            name=name,
            output=str(folder / "runs"),
            train=TrainConfig(steps=2),
            validation=ValidationConfig(manifest=held_out, num_timesteps=3, batch_size=4),
            sampling=replace(base.sampling, prompts=("word number 3",)),
        )
        train(run)
        lines = numbers(run_folder(run))
        changed[name] = [line["validation/loss"] for line in lines if "validation/loss" in line]
        assert (run_folder(run) / "samples/step-00000002/000.mp4").stat().st_size
        assert len(list((run_folder(run) / "real").glob("*.mp4"))) == 4
    assert len(changed["live"]) == 2
    assert changed["kept"] == pytest.approx(changed["live"], rel=1e-3)
    assert changed["mixed"] == pytest.approx(changed["live"], rel=1e-3)


def test_held_out_clips_of_another_encoder_are_refused(config, cached, tmp_path):
    other = replace(config, name="other", seed=1)  # other random weights
    store = tmp_path / "held-out"
    encoded = longtake("encode", "--config", save_config(other), "--output", store)
    assert encoded.status == 0, encoded.err
    refused = replace(
        cached,
        name="refused",
        output=str(tmp_path / "runs"),
        validation=ValidationConfig(manifest=str(store)),
    )
    assert "another video encoder than the latent store was encoded with" in _refused(refused)


def test_labels_need_no_text(tmp_path, manifest):
    config = labelled(tiny_config(tmp_path, manifest))
    config = replace(config, sampling=replace(config.sampling, labels=()))
    store = tmp_path / "store"
    encoded = longtake("encode", "--config", save_config(config), "--output", store)
    assert "3 clips and 0 captions" in encoded.out
    cached = replace(config, name="kept", data=replace(config.data, manifest=str(store)))
    start = replace(config, data=replace(config.data, clip_position="start"))
    train(start)
    train(cached)
    # One place is stored, the beginning; the only rounding is that to bf16.
    assert losses(run_folder(cached)) == pytest.approx(losses(run_folder(config)), rel=1e-3)


def _refused(config, **options):
    outcome = longtake("train", "--config", save_config(config), "--dry-run", **options)
    assert outcome.status == 0, outcome.err
    outcome = longtake("train", "--config", save_config(config), **options)
    assert outcome.status == 2, outcome.err
    assert "Traceback" not in outcome.err
    return outcome.err


def test_another_encoder_is_refused_by_name(cached, tmp_path):
    config = replace(cached, name="refused", output=str(tmp_path / "runs"))
    video, text = config.video_encoder, config.text_encoder
    wider = tmp_path / "wider"
    wider.mkdir()
    (wider / "config.json").write_text(json.dumps(TINY_VAE | {"block_out_channels": [8, 16]}))
    for change, problem in (
        ({"video_encoder": VideoEncoderConfig()}, "video_encoder.kind=dct, but the latent store"),
        (
            {"video_encoder": replace(video, class_name="AutoencoderTiny")},
            "video_encoder.class_name=AutoencoderTiny, but the latent store was encoded with "
            "AutoencoderKL",
        ),
        (
            {"video_encoder": replace(video, path=str(wider))},
            "another video encoder than the latent store was encoded with: its config_sha256 is",
        ),
        (
            {"text_encoder": replace(text, kind="umt5")},
            "text_encoder.kind=umt5, but the latent store was encoded with t5",
        ),
        (
            {
                "text_encoder": replace(text, max_tokens=9),
                "model": replace(config.model, max_caption_tokens=9),
            },
            "text_encoder.max_tokens=9, but the latent store was encoded with 12",
        ),
        # Random weights are drawn from the seed: found out when a sample needs them, at once.
        (
            {"seed": 1, "sampling": replace(config.sampling, prompts=("a",))},
            "another video encoder than the latent store was encoded with: its "
            "weights_sample_sha256",
        ),
    ):
        assert problem in _refused(replace(config, **change)), problem


def test_the_same_weights_elsewhere_are_the_same_encoder(cached, tmp_path):
    """A folder that has moved is recognized by its weights."""
    shutil.copytree(cached.video_encoder.path, tmp_path / "moved")
    moved = replace(cached.video_encoder, path=str(tmp_path / "moved"))
    train(replace(cached, name="moved-vae", video_encoder=moved, train=TrainConfig(steps=1)))


def test_a_store_that_does_not_suit_is_refused(cached, store, tmp_path):
    config = replace(cached, name="refused", output=str(tmp_path / "runs"))
    (tmp_path / "unfinished/shards").mkdir(parents=True)
    other = replace(config.data, frame_interval=2)
    unfinished = replace(config.data, manifest=str(tmp_path / "unfinished"))
    for change, problem in (
        ({"data": other}, "data.frame_interval=2, but the latent store"),
        ({"data": unfinished}, "has not been finished: run longtake encode once more"),
    ):
        assert problem in _refused(replace(config, **change)), problem


def test_a_store_of_labels_cannot_train_text(cached, tmp_path, manifest):
    config = labelled(tiny_config(tmp_path, manifest))
    store = tmp_path / "store"
    longtake("encode", "--config", save_config(config), "--output", store)
    text = tiny_config(tmp_path, store)
    assert "holds no text embeddings" in _refused(replace(text, name="text"))


def test_bad_samples_of_a_store_are_reported_like_bad_clips(cached, store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    for shard in copy.glob("shards/clips-*"):
        raw = bytearray(shard.read_bytes())
        raw[-50] ^= 4  # in the last clip's statistics
        shard.write_bytes(raw)
    config = replace(
        cached,
        name="damaged",
        output=str(tmp_path / "runs"),
        data=replace(cached.data, manifest=str(copy), max_bad_fraction=0.9),
    )
    train(config)
    text = (run_folder(config) / "bad_samples.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines
    assert {line["reason"] for line in lines} == {"corrupt"}
    assert all("of the latent store" in line["text"] for line in lines)


def test_8_bits_train_almost_alike(config, straight, tmp_path):
    store = tmp_path / "store"
    arguments = ["encode", "--config", save_config(config), "--output", store, "--latents", "8bit"]
    encoded = longtake(*arguments)
    assert encoded.status == 0, encoded.err
    [line] = [line for line in encoded.out.splitlines() if line.startswith("8 bits against bf16")]
    assert "root-mean-square error 0.00" in line
    assert "posterior standard deviations off by 0.0" in line or "off by 0.1" in line
    facts = json.loads((store / "store.json").read_text())["store"]["facts"]["error_of_8bit"]
    assert 0 < facts["rms_error"] < 0.01 * facts["latents_std"]
    eight = replace(config, name="eight", output=str(tmp_path / "runs"))
    eight = replace(eight, data=replace(eight.data, manifest=str(store)))
    train(eight)
    assert losses(run_folder(eight)) == pytest.approx(losses(straight[0]), rel=1e-2)
    assert losses(run_folder(eight)) != losses(straight[0])
