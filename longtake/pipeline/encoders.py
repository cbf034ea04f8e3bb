"""The frozen encoders of a run, made ready to work beside the transformer: compiled, and on several
processes replicated or sharded. Both are done from outside, as to the transformer."""

from __future__ import annotations

import logging

import torch

from longtake.encoders import (
    TextEncoder,
    TextEncoderConfig,
    VideoEncoder,
    VideoEncoderConfig,
    build_text_encoder,
    build_video_encoder,
)
from longtake.encoders.diffusers_vae import DiffusersVideoEncoder
from longtake.encoders.t5 import T5Encoder
from longtake.parallel import Mesh, compile_blocks, shard_blocks

log = logging.getLogger(__name__)

# T5 is replicated if it takes no more than this share of a device's memory. A copy of T5-XXL in
# bf16 is an eighth of 80 GB; gathering its blocks anew in every step moves as much over the links.
_SHARE_OF_MEMORY = 0.25


def build_encoders(
    video_config: VideoEncoderConfig, text_config: TextEncoderConfig, mesh: Mesh, seed: int
) -> tuple[VideoEncoder, TextEncoder | None]:
    """Both encoders on this process's device; text is None for a run with labels."""
    video = ready_video_encoder(video_config, mesh, seed)
    return video, ready_text_encoder(text_config, mesh, seed)


def ready_video_encoder(config: VideoEncoderConfig, mesh: Mesh, seed: int) -> VideoEncoder:
    """The configured video encoder, compiled where it is to be.

    Raises:
        ValueError: a setting does not go with the encoder it is for.
    """
    video = build_video_encoder(config, mesh.device, seed)
    _prepare_video(video, config, mesh.device)
    return video


def ready_text_encoder(config: TextEncoderConfig, mesh: Mesh, seed: int) -> TextEncoder | None:
    """The configured text encoder, compiled and sharded where it is to be; None for labels."""
    text = build_text_encoder(config, mesh.device, seed)
    if isinstance(text, T5Encoder):
        if config.compile or (config.compile is None and mesh.device.type == "cuda"):
            compile_blocks(text.blocks)
        if config.placement == "sharded" and mesh.num_shards == 1 and mesh.world_size > 1:
            log.warning(
                "text_encoder.placement=sharded has no effect with parallel.zero=0, or with "
                "dp_shard=1 and sp=1: no two processes share weights, so each holds the whole text "
                "encoder"
            )
        # After compilation, as for the transformer: weights are gathered outside of the graphs.
        if text_placement(config, text, mesh) == "sharded":
            shard_blocks(
                text.model,
                text.blocks,
                mesh.with_own_groups().fsdp_mesh,
                param_dtype=text.dtype,
                reshard_after_forward=True,
            )
    return text


def text_placement(config: TextEncoderConfig, text: TextEncoder | None, mesh: Mesh) -> str:
    """Whether a process holds the whole text encoder, "replicated", or a part of it, "sharded".

    Encoders without weights are always replicated, and so is T5 where no two processes share
    weights.
    """
    if not isinstance(text, T5Encoder) or mesh.num_shards == 1:
        return "replicated"
    if config.placement != "auto" or mesh.device.type != "cuda":
        return "sharded" if config.placement == "sharded" else "replicated"
    total = torch.cuda.get_device_properties(mesh.device).total_memory
    return "replicated" if text.num_bytes <= _SHARE_OF_MEMORY * total else "sharded"


def _prepare_video(video: VideoEncoder, config: VideoEncoderConfig, device: torch.device) -> None:
    network = video.network if isinstance(video, DiffusersVideoEncoder) else None
    for name in ("compile", "channels_last"):
        if getattr(config, name) and network is None:
            what = config.class_name if config.kind == "diffusers" else config.kind
            raise ValueError(
                f"video_encoder.{name}=True has no effect on {what}, which is not one network over "
                f"single frames: leave it unset"
            )
    if not isinstance(video, DiffusersVideoEncoder) or network is None:
        return
    is_compiled = device.type == "cuda" if config.compile is None else config.compile
    if is_compiled if config.channels_last is None else config.channels_last:
        video.set_channels_last()
    if is_compiled:
        compile_blocks([network])
