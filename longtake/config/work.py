"""What a step of a run amounts to in samples, tokens and FLOPs, and the meter that counts it."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import nn

from longtake.config.layers import kernels_by_layer, ring_size
from longtake.config.run import RunConfig
from longtake.data import Bucket
from longtake.encoders import VideoEncoder
from longtake.parallel import PIECE_TOKENS, Mesh, blocks_per_unit, compute_dtype
from longtake.planning import (
    PeakMemory,
    exchanged_bytes,
    forward_macs,
    has_full_attention,
    peak_bf16_flops,
    peak_memory,
    ring_bytes,
    token_grid,
    training_flops,
)
from longtake.training import ThroughputMeter


class Work(TypedDict):
    """What one step of a bucket amounts to, all processes together."""

    samples: int
    tokens: int
    flops: float


def work_of_step(config: RunConfig, video_encoder: VideoEncoder, bucket: Bucket) -> Work:
    """The transformer's work alone; the encoders' is not counted."""
    latents = latents_of_bucket(video_encoder, bucket)
    return work_of_latents(config, latents, samples=bucket.batch_size)


def latents_of_bucket(video_encoder: VideoEncoder, bucket: Bucket) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a bucket's samples."""
    _, *latents = video_encoder.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    frames, rows, columns = latents
    return frames, rows, columns


def work_of_latents(config: RunConfig, latents: tuple[int, int, int], *, samples: int) -> Work:
    """The transformer's work on samples of so many latent frames, rows and columns."""
    grid = token_grid(latents, patch=config.model.patch_size)
    depth, hidden_size, _ = config.model.dimensions
    macs = forward_macs(
        config.model.name,
        grid,
        hidden_size=hidden_size,
        depth=depth,
        text_tokens=config.model.max_caption_tokens,
        mlp_ratio=config.model.mlp_ratio,
    )
    return {
        "samples": samples,
        "tokens": samples * grid.total,
        "flops": samples * training_flops(macs),
    }


def predicted_peak(
    config: RunConfig,
    mesh: Mesh,
    model: nn.Module,
    latents: tuple[int, int, int, int],
    *,
    micro_batch: int,
    accumulation: int = 1,
) -> PeakMemory | None:
    """What a step on samples of so many latent channels, frames, rows and columns takes of a GPU's
    memory, without encoders; None on plain torch, whose operations keep more than the fused ones.
    """
    if kernels_by_layer(config, latents[1:], mesh.device)["element-wise"] != "triton":
        return None
    return peak_of_grid(
        config,
        model,
        latents,
        micro_batch=micro_batch,
        shards=mesh.num_shards,
        processes=mesh.world_size,
        sp=mesh.sp,
        accumulation=accumulation,
        bytes_per_value=compute_dtype(config.parallel, mesh.device).itemsize,
    )


def peak_of_grid(
    config: RunConfig,
    model: nn.Module,
    latents: tuple[int, int, int, int],
    *,
    micro_batch: int,
    shards: int,
    processes: int,
    sp: int,
    accumulation: int = 1,
    bytes_per_value: int = 2,
) -> PeakMemory:
    """The same on a grid of so many processes, of which `shards` share one copy of the weights and
    sp the tokens of a sample, with fused operations."""
    depth, hidden_size, num_heads = config.model.dimensions
    blocks = model.blocks
    assert isinstance(blocks, nn.ModuleList)
    return peak_memory(
        config.model.name,
        token_grid(latents[1:], patch=config.model.patch_size),
        hidden_size=hidden_size,
        num_heads=num_heads,
        depth=depth,
        parameters=sum(param.numel() for param in model.parameters()),
        block_parameters=sum(param.numel() for param in blocks[0].parameters()),
        micro_batch=micro_batch,
        latent_values=micro_batch * math.prod(latents),
        checkpointing=config.parallel.checkpointing,
        objective=config.diffusion.objective,
        offload=config.parallel.offload,
        kept_inputs=config.parallel.kept_inputs,
        kept_blocks=config.parallel.kept_blocks,
        pieces=config.parallel.pieces,
        zero=config.parallel.zero,
        shards=shards,
        blocks_per_unit=blocks_per_unit(config.parallel, depth, shards=shards, processes=processes),
        sp=sp,
        accumulation=accumulation,
        text_tokens=config.model.max_caption_tokens,
        mlp_ratio=config.model.mlp_ratio,
        piece_tokens=PIECE_TOKENS,
        bytes_per_value=bytes_per_value,
    )


def largest_peak(
    config: RunConfig, mesh: Mesh, model: nn.Module, video_encoder: VideoEncoder
) -> PeakMemory | None:
    """`predicted_peak` of the bucket that takes most, in micro-batches of a training run."""
    accumulation = config.train.accumulation
    peaks = [
        predicted_peak(
            config,
            mesh,
            model,
            video_encoder.latent_shape(bucket.num_frames, bucket.height, bucket.width),
            micro_batch=bucket.batch_size // (mesh.dp_size * accumulation),
            accumulation=accumulation,
        )
        for bucket in config.data.buckets
    ]
    known = [peak for peak in peaks if peak is not None]
    return max(known, key=lambda peak: peak.total, default=None)


def exchanged_mib(
    config: RunConfig, mesh: Mesh, latents: tuple[int, int, int]
) -> tuple[float, float]:
    """MiB that each process puts into all-to-alls, and sends around its ring, per sample of so many
    latent frames, rows and columns, in one forward. The backward puts in as much and sends twice as
    much; blocks computed again, the forward's."""
    depth, hidden_size, _ = config.model.dimensions
    where = config.model.name, token_grid(latents, patch=config.model.patch_size)
    how = {
        "hidden_size": hidden_size,
        "depth": depth,
        "sp": mesh.sp,
        "ring": ring_size(config),
        "bytes_per_value": compute_dtype(config.parallel, mesh.device).itemsize,
    }
    return exchanged_bytes(*where, **how) / 2**20, ring_bytes(*where, **how) / 2**20


def token_notes(config: RunConfig, mesh: Mesh, video_encoder: VideoEncoder) -> list[str]:
    """What a user of sequence parallelism should know of this run; nothing without it."""
    if mesh.sp == 1:
        return []
    notes = [
        f"sp={mesh.sp}: the processes of a group share the tokens of a sample and its encoding; "
        "each decodes the whole of it for itself (a latent store spares both)"
    ]
    ring = ring_size(config)
    if ring > 1:
        by_heads = mesh.sp // ring
        over_heads = "" if by_heads == 1 else f", its heads over {by_heads}"
        notes.append(
            f"sp={mesh.sp} is more than divides num_heads={config.model.dimensions[2]}: attention "
            f"goes around rings of {ring} processes{over_heads}"
        )
    has_frames = not has_full_attention(config.model.name)
    for bucket in config.data.buckets:
        grid = token_grid(latents_of_bucket(video_encoder, bucket), patch=config.model.patch_size)
        filled = -(-grid.time // mesh.sp) * mesh.sp
        if has_frames and filled != grid.time:
            notes.append(
                f"bucket {bucket} has {grid.time} frames of patches, which sp={mesh.sp} fills up "
                f"to {filled}: {1 - grid.time / filled:.0%} of the work outside of temporal "
                "attention is for nothing"
            )
    return notes


def throughput_meter(config: RunConfig, mesh: Mesh) -> ThroughputMeter:
    """A meter that knows the devices' peak, where there is a published one."""
    peak = None
    if mesh.device.type == "cuda" and compute_dtype(config.parallel, mesh.device) is torch.bfloat16:
        peak = peak_bf16_flops(torch.cuda.get_device_name(mesh.device))
    return ThroughputMeter(
        total_steps=config.train.steps,
        num_devices=mesh.world_size,
        peak_flops_per_second=peak,
    )
