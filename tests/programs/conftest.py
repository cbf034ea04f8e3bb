import json
from dataclasses import replace

import pytest

from longtake.config import TrainConfig
from longtake.encoders import VideoEncoderConfig
from tests.programs.runs import labelled, make_clips, run_folder, tiny_config, train

# One narrow block per resolution: an AutoencoderKL that halves the frame.
TINY_VAE = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 32,
}


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """Three tiny clips with captions and labels."""
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def text_run(tmp_path_factory, manifest):
    """The folder of a run on captions, with checkpoints of steps 4 and 6."""
    config = tiny_config(tmp_path_factory.mktemp("text"), manifest)
    config = replace(
        config,
        train=TrainConfig(steps=6, log_every_steps=2),
        sampling=replace(config.sampling, prompts=("a square", "two squares")),
    )
    train(config)
    return run_folder(config)


@pytest.fixture(scope="session")
def label_run(tmp_path_factory, manifest):
    """The folder of a run on labels."""
    config = labelled(tiny_config(tmp_path_factory.mktemp("label"), manifest))
    train(config)
    return run_folder(config)


@pytest.fixture(scope="session")
def random_run(tmp_path_factory, manifest):
    """The folder of a run whose autoencoder has random weights; seed and all else as `text_run`."""
    folder = tmp_path_factory.mktemp("random")
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text(json.dumps(TINY_VAE))
    config = tiny_config(folder, manifest, train=TrainConfig(steps=1, log_every_steps=1))
    config = replace(
        config,
        model=replace(config.model, in_channels=4),
        video_encoder=VideoEncoderConfig(kind="diffusers", path=str(folder / "vae")),
        sampling=replace(config.sampling, prompts=("a square",)),
    )
    train(config, "--encoder-weights", "random")
    return run_folder(config)
