"""The real classes of diffusers and transformers, tiny and random: encoded, kept, finished."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longtake.data import Bucket, MediaSource, View, open_manifest
from longtake.encoders import (
    LatentStats,
    TextEncoderConfig,
    VideoEncoderConfig,
    build_text_encoder,
    build_video_encoder,
)
from longtake.store import StoreSource, stored_encoders
from tests.encoders.test_diffusers_vae import TINY
from tests.encoders.test_t5 import CLASSES, _save_tokenizer
from tests.programs.runs import tiny_config
from tests.programs.stores import encode_here, make_many_clips

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

COUNT = 3


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_many_clips(tmp_path_factory.mktemp("many"), COUNT, num_frames=10)


def _config(folder, manifest, num_frames=4, **changes):
    config = tiny_config(folder, manifest)
    bucket = Bucket(num_frames=num_frames, height=32, width=64)
    data = replace(config.data, buckets=(bucket,), clip_position="start", flip=True)
    return replace(config, data=data, **changes)


def _read_all(source):
    """Clips and their pixels would come in this order."""
    return [
        source.read(sample_id, 0, View(flip=flip))
        for sample_id in range(COUNT)
        for flip in (False, True)
    ]


@pytest.mark.parametrize("class_name", TINY)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_statistics_come_back_and_are_finished_alike(tmp_path, manifest, class_name, dtype):
    settings, num_frames, _, _ = TINY[class_name]
    torch.manual_seed(0)
    getattr(diffusers, class_name)(**settings).save_pretrained(tmp_path / "vae")
    video = VideoEncoderConfig(
        kind="diffusers", class_name=class_name, path=str(tmp_path / "vae"), dtype=dtype
    )
    config = _config(tmp_path, manifest, num_frames, video_encoder=video)
    assert encode_here(config, tmp_path / "store") == 0

    source = StoreSource(tmp_path / "store", config.data, with_text=False)
    kept = _read_all(source)
    pixels = _read_all(MediaSource(config.data, open_manifest(config.data)))
    real = build_video_encoder(video, "cpu")
    # In the calls of the command: all six clips at once.
    stats = real.encode(torch.stack(pixels))
    mean_BCTHW = torch.stack([clip.mean_CTHW for clip in kept])
    assert torch.equal(mean_BCTHW, stats.mean_BCTHW.bfloat16())
    logvars = [clip.logvar_CTHW for clip in kept if clip.logvar_CTHW is not None]
    assert len(logvars) == (0 if stats.logvar_BCTHW is None else 2 * COUNT)
    logvar_BCTHW = None
    if stats.logvar_BCTHW is not None:
        logvar_BCTHW = torch.stack(logvars)
        assert torch.equal(logvar_BCTHW, stats.logvar_BCTHW.bfloat16())

    cpu = torch.device("cpu")
    stored, _ = stored_encoders(source.recipe, video, TextEncoderConfig(), cpu, 0)
    assert stored.latent_shape(num_frames, 32, 64) == tuple(mean_BCTHW.shape[1:])
    assert stored.latent_channels == real.latent_channels
    assert stored.downsample == real.downsample
    noise_BCTHW = torch.randn(mean_BCTHW.shape)
    kept_stats = LatentStats(mean_BCTHW, logvar_BCTHW)
    finished = stored.finish(kept_stats, noise_BCTHW)
    assert torch.equal(finished, real.finish(kept_stats, noise_BCTHW))
    if dtype == "bf16":
        assert torch.equal(finished, real.finish(stats, noise_BCTHW)), "a store rounds nothing here"
    assert torch.equal(stored.decode(finished[:1]), real.decode(finished[:1]))


@pytest.mark.parametrize("kind", CLASSES)
def test_captions_are_kept_at_their_true_length(tmp_path, manifest, kind):
    config_class, model_class = CLASSES[kind]
    from longtake.encoders.public_configs import T5_CONFIGS

    torch.manual_seed(0)
    model = getattr(transformers, model_class)(
        getattr(transformers, config_class)(**T5_CONFIGS[kind]["tiny"])
    )
    model.save_pretrained(tmp_path / "text/text_encoder")
    _save_tokenizer(tmp_path / "text/tokenizer")
    text = TextEncoderConfig(
        kind=kind,
        path=str(tmp_path / "text"),
        subfolder="text_encoder",
        tokenizer_subfolder="tokenizer",
        max_tokens=16,
    )
    config = _config(tmp_path, manifest, text_encoder=text)
    assert encode_here(config, tmp_path / "store") == 0
    source = StoreSource(tmp_path / "store", config.data, with_text=True)
    captions = [source.manifest[sample_id].caption for sample_id in range(COUNT)]
    prompt = build_text_encoder(text, "cpu").encode(captions)
    lengths = prompt.mask_BL.sum(dim=1).tolist()
    assert len(set(lengths)) == COUNT
    for sample_id, length in enumerate(lengths):
        embeds_LK = source.read(sample_id, 0, View()).embeds_LK
        assert torch.equal(embeds_LK, prompt.embeds_BLK[sample_id, :length].bfloat16())
    assert source.index.entries.sizes[source.index.text].tolist() == [
        length * 64 * 2 for length in lengths
    ]
    assert "vocabulary_sha256" in source.recipe.text.identity


class _Overflowing:
    """What an encoder in fp16 does to a bright clip."""

    def __init__(self, encoder):
        self._encoder = encoder

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def encode(self, pixels_BCTHW):
        stats = self._encoder.encode(pixels_BCTHW)
        stats.mean_BCTHW[1] = float("inf")
        return stats


def test_clips_that_overflow_are_skipped_and_named(tmp_path, manifest, monkeypatch, capsys):
    from longtake.store import encoding as program

    build = program.build_video_encoder
    monkeypatch.setattr(program, "build_video_encoder", lambda *given: _Overflowing(build(*given)))
    config = _config(tmp_path, manifest)
    config = replace(config, data=replace(config.data, flip=False))
    assert encode_here(config, tmp_path / "store") == 0
    out = capsys.readouterr().out
    assert "failed: 1 not_finite" in out
    assert "1.mp4 (line 2): the encoder makes infinities of this clip" in out
