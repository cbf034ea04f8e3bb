"""`longtake train` from the command line: what it leaves behind, and that it learns."""

import json
import os
import subprocess
from dataclasses import replace

import pytest

from longtake.config import RunConfig, TrainConfig, ValidationConfig, dump_yaml, load_yaml
from longtake.data import Bucket, read_clip
from longtake.diffusion import SamplerConfig
from longtake.training import OptimizerConfig, read_metrics
from tests.programs.runs import (
    SIDE,
    labelled,
    longtake,
    longtake_in,
    losses,
    python_m_longtake,
    run_folder,
    save_config,
    tiny_config,
    train,
    write_manifest,
)

pytestmark = pytest.mark.slow

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def learned(tmp_path_factory, manifest):
    """A run of a real interpreter on one clip, long enough to learn it: config, folder, output."""
    folder = tmp_path_factory.mktemp("learned")
    row = {"path": "clip0.mp4", "caption": "a square"}
    one = write_manifest(manifest.parent / "one.jsonl", [row])
    config = tiny_config(
        folder,
        one,
        train=TrainConfig(steps=60, log_every_steps=10, condition_dropout=0.0),
        optimizer=OptimizerConfig(lr=2e-2),
        validation=ValidationConfig(manifest=str(one), every_steps=30, num_timesteps=4),
    )
    config = replace(
        config,
        model=replace(config.model, hidden_size=64),
        data=replace(config.data, clip_position="start"),
        sampling=replace(config.sampling, prompts=("a square", "nothing"), every_steps=30),
        metrics=replace(config.metrics, tensorboard=True),
    )
    command = python_m_longtake("train", "--config", save_config(config))
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return config, run_folder(config), done.stdout


def test_one_command_leaves_a_complete_run(learned):
    config, folder, out = learned
    assert load_yaml(folder / "config.yaml", RunConfig) == config
    record = json.loads((folder / "run.json").read_text())
    assert record["steps_done"] == 60
    assert record["encoders"]["random"] is False
    assert record["data"]["samples"] == 1
    assert list((folder / "tensorboard").glob("events.*"))
    assert (folder / "checkpoints/step-60/manifest.json").exists()
    for step in (30, 60):
        samples = folder / f"samples/step-{step:08}"
        assert read_clip(samples / "001.mp4", num_frames=4).shape == (4, 3, SIDE, SIDE)
        listing = json.loads((samples / "captions.json").read_text())
        assert listing == {"000.mp4": "a square", "001.mp4": "nothing"}
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") >= 2
    assert "step 60/60" in out
    assert f"report: {folder / 'report.html'}" in out
    assert not (folder / "bad_samples.jsonl").exists()


def test_loss_falls_on_one_clip(learned):
    _, folder, _ = learned
    lines = read_metrics(folder)
    held_out = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert len(held_out) == 3
    assert held_out[-1] < 0.5 * held_out[0]
    training = list(losses(folder).values())
    assert training[-1] < 0.65 * training[0]
    assert {"validation/loss_t125", "validation/loss_t875"} <= lines[0].keys()


@pytest.mark.parametrize("name", ["pixart", "stdit2"])
def test_text_models_train_as_iddpm(tmp_path, manifest, name):
    config = labelled(tiny_config(tmp_path, manifest), name)
    plain = tiny_config(tmp_path, manifest)
    sampler = SamplerConfig(name="ddpm", steps=2, guidance_scale=3.0, guidance_channels=3)
    config = replace(
        config,
        model=replace(config.model, micro_conditioning=name == "pixart", hidden_size=48),
        text_encoder=plain.text_encoder,
        sampling=replace(plain.sampling, prompts=("a square",), sampler=sampler),
        train=TrainConfig(steps=2, log_every_steps=1),
    )
    train(config)
    assert len(losses(run_folder(config))) == 2
    assert (run_folder(config) / "samples/step-00000002/000.mp4").exists()


def test_latte_trains_on_labels_in_two_buckets(tmp_path, manifest):
    config = labelled(tiny_config(tmp_path, manifest), "latte")
    buckets = (
        Bucket(num_frames=3, height=24, width=40, batch_size=2),
        Bucket(num_frames=1, height=32, width=32, batch_size=4, weight=5.0),
    )
    config = replace(config, data=replace(config.data, buckets=buckets))
    batches = train(config).batches
    assert {len(batch) for batch in batches.values()} == {2, 4}
    samples = run_folder(config) / "samples/step-00000004"
    assert read_clip(samples / "000.mp4", num_frames=3).shape == (3, 3, 24, 40)
    assert json.loads((samples / "captions.json").read_text())["001.mp4"] == "label 2"


def test_dit_trains_on_images(tmp_path, manifest):
    config = labelled(tiny_config(tmp_path, manifest))
    bucket = Bucket(num_frames=1, height=SIDE, width=SIDE, batch_size=4)
    config = replace(config, data=replace(config.data, buckets=(bucket,)))
    train(config)
    samples = run_folder(config) / "samples/step-00000004"
    assert sorted(path.name for path in samples.iterdir()) == [
        "000.png",
        "001.png",
        "captions.json",
    ]


def _with_bad_files(manifest, folder):
    """The clips, one file of noise and one that does not exist."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    (manifest.parent / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    rows += [
        {"path": "noise.mp4", "caption": "noise", "label": 0},
        {"path": "absent.mp4", "caption": "nothing", "label": 1},
    ]
    return write_manifest(manifest.parent / f"{folder.name}-bad.jsonl", rows)


def test_unreadable_samples_are_listed_and_counted(tmp_path, manifest):
    bad = _with_bad_files(manifest, tmp_path)
    config = tiny_config(tmp_path, bad, validation=ValidationConfig(manifest=str(bad)))
    config = replace(config, data=replace(config.data, max_bad_fraction=0.9))
    outcome = train(config)
    folder = run_folder(config)
    entries = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(entry["path"] for entry in entries) == ["absent.mp4", "noise.mp4"]
    assert all(entry["reason"] and entry["text"] and entry["line"] for entry in entries)
    assert read_metrics(folder)[-2]["data/samples_unreadable"] == 2
    assert "unreadable: absent.mp4" in outcome.err
    assert None not in losses(folder).values()

    again = train(replace(config, train=TrainConfig(steps=6, log_every_steps=1)))
    assert max(again.batches) == 6
    assert (folder / "bad_samples.jsonl").read_text().count("absent.mp4") == 1


def test_too_many_unreadable_samples_stop_the_run(tmp_path, manifest):
    bad = _with_bad_files(manifest, tmp_path)
    config = tiny_config(tmp_path, bad)
    config = replace(config, data=replace(config.data, bad_grace=4, max_bad_fraction=0.1))
    outcome = longtake("train", "--config", save_config(config))
    assert outcome.status == 1
    assert "more than max_bad_fraction=0.1" in outcome.err
    assert "noise.mp4 (line 4)" in outcome.err
    assert "Traceback" not in outcome.err


def test_second_run_in_a_folder_names_the_first(tmp_path, manifest):
    config = tiny_config(tmp_path, manifest)
    outcome = longtake("train", "--config", save_config(config), signal_at=(2, 0), before=_hold)
    assert outcome.status == 2
    assert "is in use by process" in outcome.err


def _hold():
    import os
    from unittest import mock

    from longtake.programs import train as program
    from longtake.training.lock import _lock

    hold = program.hold_run_folder

    def held_already(folder):
        if not getattr(os, "_held", None):
            os._held = _lock(folder)  # type: ignore[attr-defined]
        return hold(folder)

    mock.patch.object(program, "hold_run_folder", held_already).start()


def test_dry_run_prints_a_config_that_loads_back(tmp_path, manifest):
    config = tiny_config(tmp_path, manifest)
    outcome = longtake(
        "train", "--config", save_config(config), "--dry-run", "--train.steps", "7", "--seed", "3"
    )
    assert outcome.status == 0
    (tmp_path / "printed.yaml").write_text(outcome.out)
    expected = replace(config, seed=3, train=replace(config.train, steps=7))
    assert load_yaml(tmp_path / "printed.yaml", RunConfig) == expected
    assert outcome.out == dump_yaml(expected)
    assert not run_folder(config).exists()


def _with_sampling_and_validation(folder, manifest):
    folder.mkdir()
    config = tiny_config(
        folder,
        manifest,
        train=TrainConfig(steps=6, log_every_steps=1),
        validation=ValidationConfig(manifest=str(manifest), every_steps=4, num_timesteps=2),
    )
    # Three frames do not divide by two, and neither do nine patches of a frame.
    bucket = Bucket(num_frames=3, height=40, width=40, batch_size=4)
    return replace(
        config,
        model=replace(config.model, depth=2),
        data=replace(config.data, buckets=(bucket,)),
        sampling=replace(config.sampling, prompts=("a square",)),
    )


def test_a_run_says_what_goes_around_its_rings(tmp_path, manifest):
    config = labelled(tiny_config(tmp_path, manifest))
    arguments = ["--config", save_config(config), "--train.steps", 1, "--model.num-heads", 1]
    first, second = longtake_in(2, "train", *arguments, "--parallel.sp", 2)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "sp=2 is more than divides num_heads=1: attention goes around rings of 2" in first.err
    record = json.loads((run_folder(config) / "run.json").read_text())
    assert record["parallel"]["ring"] == 2
    assert set(record["parallel"]["exchanged_mib_per_sample"].values()) == {0}
    assert all(mib > 0 for mib in record["parallel"]["ring_mib_per_sample"].values())
    assert {layers["full"] for layers in record["compute"]["kernels"].values()} == {"reference"}


def test_processes_that_share_tokens_train_as_one(tmp_path, manifest):
    alone = _with_sampling_and_validation(tmp_path / "alone", manifest)
    reference = train(alone)
    shared = _with_sampling_and_validation(tmp_path / "shared", manifest)
    path, folder = save_config(shared), run_folder(shared)
    first, second = longtake_in(
        2, "train", "--config", path, "--train.steps", 4, "--parallel.sp", 2,
        "--parallel.zero", 3, "--parallel.blocks-per-unit", 2,
    )  # fmt: skip
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert first.batches == second.batches
    assert first.batches.items() <= reference.batches.items()
    assert "the processes of a group share the tokens of a sample" in first.err
    assert "bucket 3x40x40 has 3 frames of patches, which sp=2 fills up to 4: 25%" in first.err
    record = json.loads((folder / "run.json").read_text())["parallel"]
    assert (record["processes"], record["dp_shard"], record["sp"]) == (2, 1, 2)
    assert (record["zero"], record["blocks_per_unit"]) == (3, 2)
    # 2 blocks of 2 passes over half of 3 x 9 tokens, filled up to 4 x 10, of 32 values.
    assert record["exchanged_mib_per_sample"] == {"3x40x40": 2 * 2 * 4 * 10 // 2 * 32 * 4 / 2**20}

    # What two processes saved, one goes on with.
    train(shared)
    assert losses(folder) == pytest.approx(losses(run_folder(alone)), rel=1e-5)
    held_out = [
        [line["validation/loss"] for line in read_metrics(run) if "validation/loss" in line]
        for run in (folder, run_folder(alone))
    ]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    assert len(held_out[0]) == 3
    clips = [
        read_clip(run / "samples/step-00000006/000.mp4", num_frames=3)
        for run in (folder, run_folder(alone))
    ]
    assert (clips[0].int() - clips[1].int()).abs().float().mean() < 1
    assert (folder / "samples/step-00000004/000.mp4").exists()
