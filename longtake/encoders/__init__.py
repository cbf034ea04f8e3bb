"""Frozen encoders: pixels to latents and back, captions to embeddings."""

from longtake.encoders.build import (
    TextEncoderConfig,
    VideoEncoderConfig,
    build_text_encoder,
    build_video_encoder,
)
from longtake.encoders.protocol import LatentStats, PromptEmbeds, TextEncoder, VideoEncoder

__all__ = [
    "LatentStats",
    "PromptEmbeds",
    "TextEncoder",
    "TextEncoderConfig",
    "VideoEncoder",
    "VideoEncoderConfig",
    "build_text_encoder",
    "build_video_encoder",
]
