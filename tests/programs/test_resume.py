"""Stopped, killed and resumed runs end with the bits of one that was left alone."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from longtake.config import TrainConfig
from longtake.data import Bucket
from longtake.training import CheckpointConfig
from tests.programs.runs import (
    NUM_CLIPS,
    SIDE,
    assert_same_bits,
    longtake,
    longtake_in,
    losses,
    numbers,
    read_tensors,
    run_folder,
    save_config,
    tiny_config,
    train,
    train_until_killed,
)

pytestmark = pytest.mark.slow

STEPS = 9


def _config(folder, manifest, **changes):
    # A log line covers two steps, a checkpoint four: a stop falls between both. Batches of 4 from 3
    # clips straddle an epoch in every step but one of three.
    config = tiny_config(
        folder,
        manifest,
        train=TrainConfig(steps=STEPS, log_every_steps=2),
        checkpoint=CheckpointConfig(every_steps=4, keep_last=0),
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, manifest):
    """The run that nobody disturbs: its folder and its batches."""
    config = _config(tmp_path_factory.mktemp("straight"), manifest)
    return run_folder(config), train(config).batches


def test_stopped_and_killed_run_ends_bit_identical(tmp_path, manifest, straight):
    config = _config(tmp_path, manifest)
    path, folder = save_config(config), run_folder(config)
    stopped = longtake("train", "--config", path, signal_at=(3, int(signal.SIGTERM)))
    assert stopped.status == 75, stopped.err
    assert "stopped at step 3 and saved" in stopped.out
    assert (folder / "checkpoints/step-3/manifest.json").exists()
    assert not (folder / "samples").exists()

    train_until_killed(config, step=6)
    assert not (folder / "checkpoints/step-9").exists()

    workers = replace(config, data=replace(config.data, num_workers=2))
    finished = train(workers)
    assert "resumed from" in finished.err
    assert_same_bits(folder, straight[0])
    assert numbers(folder) == numbers(straight[0])
    for step, batch in {**stopped.batches, **finished.batches}.items():
        assert batch == straight[1][step]
    assert max(finished.batches) == STEPS
    epochs = {epoch for batch in straight[1].values() for epoch, _ in batch}
    assert len(epochs) > 9 * 4 // NUM_CLIPS - 1


def _forget_moments():
    from longtake.training import Checkpointer

    resume = Checkpointer.resume

    def broken(self, model, optimizer, ema):
        extra = resume(self, model, optimizer, ema)
        for moments in optimizer.state.values():
            moments["exp_avg"].zero_()
        return extra

    Checkpointer.resume = broken  # type: ignore[method-assign]


def test_comparison_notices_forgotten_moments(tmp_path, manifest, straight):
    config = _config(tmp_path, manifest)
    folder = run_folder(config)
    shutil.copytree(straight[0] / "checkpoints/step-4", folder / "checkpoints/step-4")
    train(config, before=_forget_moments)
    first, second = read_tensors(folder), read_tensors(straight[0])
    assert not first["model.final_layer.linear.weight"].equal(
        second["model.final_layer.linear.weight"]
    )


def _parallel_config(folder, manifest, steps, **changes):
    return tiny_config(
        folder,
        manifest,
        train=TrainConfig(steps=steps, log_every_steps=1),
        checkpoint=CheckpointConfig(every_steps=4, keep_last=0),
        **changes,
    )


def _together(outcomes):
    """Step -> the global batch: the processes' parts, first rank first."""
    assert [outcome.status for outcome in outcomes] == [0] * len(outcomes), outcomes[0].err
    return {
        step: [key for outcome in outcomes for key in outcome.batches[step]]
        for step in outcomes[0].batches
    }


def test_two_processes_resume_on_one_and_four(tmp_path, manifest):
    alone = _parallel_config(tmp_path / "alone", manifest, 6)
    (tmp_path / "alone").mkdir()
    reference = train(alone).batches
    expected = losses(run_folder(alone))

    two = _parallel_config(tmp_path / "two", manifest, 4)
    (tmp_path / "two").mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "longtake", "train", "--config"]
    done = subprocess.run([*command, save_config(two)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4/4") == 1

    for world_size in (1, 4):
        name = f"on-{world_size}"
        config = _parallel_config(tmp_path / "two", manifest, 6)
        shutil.copytree(run_folder(two), run_folder(replace(config, name=name)))
        arguments = ["train", "--config", save_config(config), "--name", name]
        batches = _together(longtake_in(world_size, *arguments))
        assert batches == {step: reference[step] for step in (5, 6)}
        resumed = losses(run_folder(replace(config, name=name)))
        assert resumed == pytest.approx(expected, rel=1e-5)


def test_signal_to_one_of_two_processes_stops_both(tmp_path, manifest):
    config = _parallel_config(tmp_path, manifest, 6)
    arguments = ["train", "--config", save_config(config)]
    stopped = longtake_in(2, *arguments, signal_at=(2, int(signal.SIGUSR1)), signal_rank=1)
    assert [outcome.status for outcome in stopped] == [75, 75], stopped[0].err
    assert (run_folder(config) / "checkpoints/step-2/manifest.json").exists()
    assert stopped[0].batches.keys() == {1, 2}


def test_signal_to_all_processes_of_a_run_leaves_it_its_workers(tmp_path, manifest):
    config = _parallel_config(tmp_path, manifest, 6)
    config = replace(
        config,
        data=replace(config.data, num_workers=2),
        train=replace(config.train, accumulation=4),
    )
    arguments = ["train", "--config", save_config(config)]
    # The workers hear of it first, and there is more to read than they have prepared.
    stopped = longtake(*arguments, workers_stopped_at=1, signal_at=(4, int(signal.SIGTERM)))
    assert stopped.status == 75, stopped.err
    assert (run_folder(config) / "checkpoints/step-4/manifest.json").exists()


def test_accumulation_changes_no_loss(tmp_path, manifest):
    config = _parallel_config(tmp_path, manifest, 4)
    whole = train(config)
    halves = replace(
        config, name="halves", train=replace(config.train, accumulation=2), seed=config.seed
    )
    assert train(halves).batches == whole.batches
    assert losses(run_folder(halves)) == pytest.approx(losses(run_folder(config)), rel=1e-5)
    other = replace(config, name="other", seed=1)
    assert train(other).batches != whole.batches
    assert losses(run_folder(other)) != pytest.approx(losses(run_folder(config)), rel=1e-3)


def test_resume_refuses_another_model_and_allows_a_longer_run(tmp_path, manifest, straight):
    config = _config(tmp_path, manifest)
    shutil.copytree(straight[0], run_folder(config))
    buckets = (Bucket(num_frames=4, height=SIDE, width=SIDE, batch_size=2),)
    changed = replace(
        config,
        model=replace(config.model, depth=2),
        data=replace(config.data, buckets=buckets),
        seed=5,
    )
    refused = longtake("train", "--config", save_config(changed))
    assert refused.status == 2
    for text in ("model.depth: 1 → 2", "batch_size: 4 → 2", "seed: 0 → 5", "--fresh"):
        assert text in refused.err
    assert "Traceback" not in refused.err

    finished = train(replace(config, train=replace(config.train, log_every_steps=3)))
    assert "nothing to do: step 9 of train.steps=9 is done" in finished.err
    assert not finished.batches

    assert train(replace(changed, train=TrainConfig(steps=1)), "--fresh").batches.keys() == {1}
    assert (run_folder(config).with_name("tiny.old-1") / "checkpoints/step-9").exists()
