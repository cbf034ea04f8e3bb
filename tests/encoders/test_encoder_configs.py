"""Encoders from their configuration, and what importing the room costs."""

import json
import subprocess
import sys

import pytest

from longtake.encoders import (
    TextEncoderConfig,
    VideoEncoderConfig,
    build_text_encoder,
    build_video_encoder,
)


def test_build_defaults_need_no_weights() -> None:
    video = build_video_encoder(VideoEncoderConfig(), "cpu", 0)
    assert video.latent_channels == 24
    assert build_text_encoder(TextEncoderConfig(), "cpu", 0) is None
    text = build_text_encoder(TextEncoderConfig(kind="hashed-words", max_tokens=16), "cpu", 0)
    assert text is not None
    assert (text.channels, text.max_tokens) == (64, 16)
    json.dumps([video.provenance, text.provenance])


def test_build_dct_settings_reach_the_encoder() -> None:
    config = VideoEncoderConfig(dct_block=4, dct_luma_channels=8, dct_chroma_channels=3)
    encoder = build_video_encoder(config, "cpu")
    assert encoder.latent_shape(16, 64, 64) == (14, 16, 16, 16)


def test_build_unknown_kinds_are_errors() -> None:
    with pytest.raises(ValueError, match="kind='vae' is unknown: use 'dct' or 'diffusers'"):
        build_video_encoder(VideoEncoderConfig(kind="vae"), "cpu")  # pyright: ignore
    with pytest.raises(ValueError, match="kind='clip' is unknown: use 'none', 'hashed-words'"):
        build_text_encoder(TextEncoderConfig(kind="clip"), "cpu")  # pyright: ignore
    with pytest.raises(ValueError, match="dtype='fp8' is unknown: use auto, fp32, bf16, fp16"):
        build_text_encoder(TextEncoderConfig(kind="t5", dtype="fp8"), "cpu")  # pyright: ignore


def test_importing_the_encoders_imports_no_pretrained_library() -> None:
    code = (
        "import sys, longtake.encoders; "
        "print([name for name in ('diffusers', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
