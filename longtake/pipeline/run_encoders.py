"""The encoders of a run that reads media, a latent store, or both."""

from __future__ import annotations

import logging
from dataclasses import replace

from longtake.data import Source
from longtake.encoders import TextEncoder, TextEncoderConfig, VideoEncoder, VideoEncoderConfig
from longtake.parallel import Mesh
from longtake.pipeline.encoders import build_encoders, ready_text_encoder, ready_video_encoder
from longtake.store import (
    StoredTextEncoder,
    StoredVideoEncoder,
    StoreSource,
    check_encoders,
    stored_encoders,
)

log = logging.getLogger(__name__)


def encoders_of_source(
    source: Source,
    video_config: VideoEncoderConfig,
    text_config: TextEncoderConfig,
    mesh: Mesh,
    seed: int,
    *,
    is_sampled: bool,
) -> tuple[VideoEncoder, TextEncoder | None]:
    """Both encoders; of a run that reads a latent store, what is left for them to do.

    With `is_sampled` the store's encoders are checked now: sampling comes late in a run, and that
    they are not the store's must not.

    Raises:
        ValueError: the encoders are not those of the store, or cannot work beside one.
    """
    text_config = text_config_of_source(source, text_config)
    if not isinstance(source, StoreSource):
        return build_encoders(video_config, text_config, mesh, seed)
    video, text = stored_encoders(source.recipe, video_config, text_config, mesh.device, seed)
    lacks_clips, lacks_text = _lacking(source)
    if is_sampled:
        if not lacks_clips:
            video.real.check()
        if text is not None and not lacks_text:
            text.real.check()
    # What the store has not got, the step encodes as if there were no store.
    encoders = (
        ready_video_encoder(video_config, mesh, seed) if lacks_clips else video,
        ready_text_encoder(text_config, mesh, seed) if lacks_text else text,
    )
    check_encoders(source.recipe, *encoders)
    return encoders


def text_config_of_source(source: Source, config: TextEncoderConfig) -> TextEncoderConfig:
    """The text encoder's, whole on every process where a store has most captions.

    Then only a process whose batch lacks one calls it, and no collective may be in there. Where the
    store has all, none calls it in a step: there is nothing to shard.
    """
    if not isinstance(source, StoreSource):
        return config
    if config.placement == "sharded" and _lacking(source)[1]:
        raise ValueError(
            "text_encoder.placement=sharded needs all processes in every step, but with a store "
            "that lacks captions only those encode whose captions it lacks: use auto or "
            "replicated, or encode all captions"
        )
    if config.placement == "sharded":
        log.warning(
            "text_encoder.placement=sharded is for steps that encode captions, and the store has "
            "them all: for prompts of samples and validation the encoder is whole on every process"
        )
    return replace(config, placement="replicated")


def _lacking(source: StoreSource) -> tuple[bool, bool]:
    """Whether the step has clips to encode, and captions, that the store has not got."""
    return source.lacking if source.media is not None else (False, False)


def release(*encoders: VideoEncoder | TextEncoder | None) -> None:
    """Gives the memory of encoders back that no training step needs."""
    for encoder in encoders:
        if isinstance(encoder, (StoredVideoEncoder, StoredTextEncoder)):
            encoder.real.release()
