"""Encoders made ready for training: compiled, sharded over processes, with the numbers they had."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

from longtake.encoders import (
    TextEncoderConfig,
    VideoEncoderConfig,
    build_text_encoder,
    build_video_encoder,
)
from longtake.parallel import ParallelConfig, build_mesh, start_distributed, stop_distributed
from longtake.pipeline import build_encoders, text_placement
from tests.processes import run_in_processes

pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
T5 = TextEncoderConfig(kind="t5", path="tiny", weights="random", max_tokens=24, num_lengths=3)
CAPTIONS = ["a b c", "", "a b c", "d e f g h i j k l m"]


@pytest.fixture
def mesh():
    yield build_mesh(ParallelConfig(), start_distributed("cpu"))
    stop_distributed()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of a tiny AutoencoderKL's config."""
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    ).save_config(folder)
    return VideoEncoderConfig(kind="diffusers", path=str(folder), weights="random")


@pytest.mark.slow
def test_compiled_encoders_keep_their_numbers_and_their_few_shapes(mesh, vae):
    torch.compiler.reset()
    pixels = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain_video, plain_text = build_encoders(vae, T5, mesh, 0)
    compiled = (replace(vae, compile=True, frames_per_call=4), replace(T5, compile=True))
    video, text = build_encoders(*compiled, mesh, 0)
    for batch in (pixels, pixels[:, :, :2]):
        own, expected = video.encode(batch), plain_video.encode(batch)
        torch.testing.assert_close(own.mean_BCTHW, expected.mean_BCTHW, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(own.logvar_BCTHW, expected.logvar_BCTHW, atol=1e-5, rtol=1e-4)
    for captions in (CAPTIONS, CAPTIONS[:2]):
        own, expected = text.encode(captions), plain_text.encode(captions)
        torch.testing.assert_close(own.embeds_BLK, expected.embeds_BLK, atol=1e-4, rtol=1e-4)
        assert torch.equal(own.mask_BL, expected.mask_BL)
    compiled_before = _compiled()
    text.encode(["x", "y", "y", "b c d e f g h i j k"])  # other captions, a shape that was there
    text.encode(["y z", "w"])
    video.encode(pixels)
    assert _compiled() == compiled_before


def _compiled():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_settings_without_effect_are_refused(mesh):
    clips = VideoEncoderConfig(kind="diffusers", class_name="AutoencoderKLWan", weights="random")
    clips = replace(clips, path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    none = TextEncoderConfig(kind="none")
    for config, what in ((VideoEncoderConfig(), "dct"), (clips, "AutoencoderKLWan")):
        for setting in ("compile", "channels_last"):
            message = f"video_encoder.{setting}=True has no effect on {what}"
            if what == "dct":
                with pytest.raises(ValueError, match=message):
                    build_encoders(replace(config, **{setting: True}), none, mesh, 0)
    video, text = build_encoders(VideoEncoderConfig(), none, mesh, 0)
    assert text is None
    assert video.latent_channels == 24


def _encode_sharded(placement, captions_by_rank, dp_replicate):
    """Of this rank: embeddings, the share of the blocks' weights that it holds, the placement."""
    mesh = build_mesh(ParallelConfig(dp_replicate=dp_replicate), start_distributed("cpu"))
    config = replace(T5, placement=placement)
    _, text = build_encoders(VideoEncoderConfig(), config, mesh, 0)
    embeds = [text.encode(captions).embeds_BLK for captions in captions_by_rank[mesh.rank]]
    held = total = 0
    for param in text.blocks.parameters():
        total += param.numel()
        held += (param.to_local() if isinstance(param, DTensor) else param).numel()
    return embeds, held / total, text_placement(config, text, mesh)


# What each process has in each of three calls: other captions, other numbers of rows and tokens.
BY_RANK = [
    [CAPTIONS, ["one two"] * 3, ["x"]],
    [["a very long caption " * 5, "b"], ["c", "d", "e"], CAPTIONS],
    [[""], ["x y z"], ["x", "y", "z"]],
    [CAPTIONS[:2], CAPTIONS[2:], ["u v"] * 5],
]


@pytest.mark.parametrize(
    ("world_size", "dp_replicate", "placement", "share"),
    [(2, 1, "sharded", 1 / 2), (4, 2, "sharded", 1 / 2), (2, 1, "auto", 1), (2, 2, "sharded", 1)],
    ids=["two processes", "two by two", "automatic", "no shards"],
)
def test_sharded_encoder_gives_every_process_its_own_captions(
    world_size, dp_replicate, placement, share
):
    found = run_in_processes(_encode_sharded, world_size, placement, BY_RANK, dp_replicate)
    whole = build_text_encoder(T5, CPU, 0)
    for (embeds, held, chosen), calls in zip(found, BY_RANK, strict=False):
        assert held == pytest.approx(share)
        assert chosen == ("sharded" if share < 1 else "replicated")
        for own, captions in zip(embeds, calls, strict=True):
            expected = whole.encode(captions).embeds_BLK
            torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-6)


def test_video_encoder_for_training_is_the_one_that_samples(mesh, vae):
    video, _ = build_encoders(replace(vae, channels_last=True), TextEncoderConfig(), mesh, 0)
    latents = torch.randn(1, 4, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        video.decode(latents), build_video_encoder(vae, CPU, 0).decode(latents)
    )
