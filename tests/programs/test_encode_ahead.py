"""A run that encodes ahead is the run that does not: its numbers, its files, its stops."""

import json
import signal
from dataclasses import replace

import pytest

from longtake.config import TrainConfig, ValidationConfig
from longtake.data import Bucket
from longtake.encoders import TextEncoderConfig
from longtake.training import CheckpointConfig
from tests.programs.runs import (
    SIDE,
    assert_same_bits,
    longtake,
    longtake_in,
    numbers,
    run_folder,
    save_config,
    tiny_config,
    train,
    train_until_killed,
)

pytestmark = pytest.mark.slow

STEPS = 7


def _config(folder, manifest, *, ahead):
    """Two shapes, two micro-batches a step, and something else to do after many of the steps."""
    config = tiny_config(
        folder,
        manifest,
        train=TrainConfig(steps=STEPS, accumulation=2, log_every_steps=2, encode_ahead=ahead),
        checkpoint=CheckpointConfig(every_steps=3, keep_last=0),
        validation=ValidationConfig(
            manifest=str(manifest), every_steps=2, batch_size=2, num_timesteps=2
        ),
    )
    buckets = tuple(
        Bucket(num_frames=frames, height=SIDE, width=SIDE, batch_size=4) for frames in (4, 2)
    )
    return replace(
        config,
        data=replace(config.data, buckets=buckets),
        sampling=replace(config.sampling, prompts=("a square",), every_steps=3),
    )


@pytest.fixture(scope="module")
def serial(tmp_path_factory, manifest):
    config = _config(tmp_path_factory.mktemp("serial"), manifest, ahead=False)
    return run_folder(config), train(config).batches


def test_encoding_ahead_changes_no_number(tmp_path, manifest, serial):
    config = _config(tmp_path, manifest, ahead=True)
    outcome = train(config)
    assert outcome.batches == serial[1], "the same batches, and none that is not trained"
    assert_same_bits(run_folder(config), serial[0])
    assert numbers(run_folder(config)) == numbers(serial[0])
    for step in (3, 6, 7):
        name = f"samples/step-{step:08}/000.mp4"
        assert (run_folder(config) / name).read_bytes() == (serial[0] / name).read_bytes()


def test_a_batch_that_was_only_begun_does_not_count_as_trained(tmp_path, manifest, serial):
    config = _config(tmp_path, manifest, ahead=True)
    # While the fourth step's batch is begun, the third is still to be trained.
    stopped = longtake("train", "--config", save_config(config), signal_at=(4, int(signal.SIGTERM)))
    assert stopped.status == 75, stopped.err
    assert "stopped at step 3 and saved" in stopped.out
    train_until_killed(config, step=6)
    # How it is done may change from one start to the next.
    finished = train(replace(config, train=replace(config.train, encode_ahead=False)))
    assert "resumed from" in finished.err
    assert_same_bits(run_folder(config), serial[0])
    assert numbers(run_folder(config)) == numbers(serial[0])
    for step in (4, 5, 6, 7):
        assert finished.batches[step] == serial[1][step]


def test_processes_encode_ahead_together(tmp_path, manifest):
    folders = []
    for ahead in (False, True):
        config = _config(tmp_path / str(ahead), manifest, ahead=ahead)
        config = replace(config, train=replace(config.train, accumulation=1, steps=3))
        (tmp_path / str(ahead)).mkdir()
        outcomes = longtake_in(2, "train", "--config", save_config(config))
        assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].err
        folders.append(run_folder(config))
    assert_same_bits(*folders)
    assert numbers(folders[0]) == numbers(folders[1])


def test_sharded_t5_trains_samples_and_validates_as_a_copy_in_each_process(tmp_path, manifest):
    pytest.importorskip("transformers")
    folders = []
    for ahead, placement in ((False, "replicated"), (True, "sharded")):
        (tmp_path / placement).mkdir()
        config = _config(tmp_path / placement, manifest, ahead=ahead)
        text = TextEncoderConfig(kind="t5", path="tiny", max_tokens=8, placement=placement)
        model = replace(config.model, caption_channels=64, num_heads=2)
        train = replace(config.train, accumulation=2, steps=3)
        config = replace(config, text_encoder=text, model=model, train=train)
        outcomes = longtake_in(
            *(2, "train", "--config", save_config(config), "--encoder-weights", "random")
        )
        assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].err
        folders.append(run_folder(config))
        encoders = json.loads((folders[-1] / "run.json").read_text())["encoders"]
        assert (encoders["ahead"], encoders["text_placement"]) == (ahead, placement)
    assert_same_bits(*folders)
    assert numbers(folders[0]) == numbers(folders[1])
    assert list((folders[1] / "samples").iterdir())


def _fail_at_the_ninth_call():
    from longtake.encoders.dct import DctEncoder

    encode, calls = DctEncoder.encode, []

    def failing(self, pixels_BCTHW):
        calls.append(1)
        if len(calls) == 9:
            try:
                raise MemoryError("no memory for frames")
            except MemoryError as error:
                raise RuntimeError("the encoder broke") from error
        return encode(self, pixels_BCTHW)

    DctEncoder.encode = failing  # type: ignore[method-assign]


def test_an_encoder_that_breaks_says_why_after_the_steps_before_it(tmp_path, manifest):
    config = replace(_config(tmp_path, manifest, ahead=True), validation=ValidationConfig())
    config = replace(config, checkpoint=CheckpointConfig(every_steps=1, keep_last=0))
    outcome = longtake("train", "--config", save_config(config), before=_fail_at_the_ninth_call)
    assert outcome.status not in (0, 75)
    assert "the encoder broke" in outcome.err
    # The ninth micro-batch is the fifth step's first: the fourth was trained and saved.
    assert (run_folder(config) / "checkpoints/step-4/manifest.json").exists()
    assert not (run_folder(config) / "checkpoints/step-5").exists()
    finished = train(config)
    assert "resumed from" in finished.err
