"""`run.json`: what really runs, on what, with what."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from longtake.config.layers import kernels_by_layer, ring_size
from longtake.config.run import RunConfig
from longtake.config.work import exchanged_mib, latents_of_bucket
from longtake.data import Manifest
from longtake.encoders import TextEncoder, VideoEncoder
from longtake.models import Model
from longtake.ops.kernels import ruled_out
from longtake.parallel import Mesh, blocks_per_unit, compute_dtype, is_compiled
from longtake.training import environment


def run_record(
    config: RunConfig,
    mesh: Mesh,
    model: Model,
    manifest: Manifest,
    video_encoder: VideoEncoder,
    text_encoder: TextEncoder | None,
) -> dict[str, Any]:
    """The record of a run that is about to start, as plain JSON values."""
    encoders = [encoder for encoder in (video_encoder, text_encoder) if encoder is not None]
    digest = _sha256(manifest.file)
    store = None
    if config.data.store:
        header = Path(config.data.store) / "store.json"
        is_here = header.is_file()  # or on object storage
        store = {"path": config.data.store, "sha256": _sha256(header) if is_here else None}
    exchanged = {
        str(bucket): exchanged_mib(config, mesh, latents_of_bucket(video_encoder, bucket))
        for bucket in config.data.buckets
    }
    return {
        "name": config.name,
        "environment": environment(),
        "model": {
            "name": f"{config.model.name}-{config.model.size}",
            "parameters": sum(param.numel() for param in model.parameters()),
        },
        "encoders": {
            "random": any(encoder.provenance["weights"] == "random" for encoder in encoders),
            "video": video_encoder.provenance,
            "text": text_encoder.provenance if text_encoder else None,
        },
        "data": {"manifest": str(manifest.file), "sha256": digest, "samples": len(manifest)}
        | ({"store": store} if store else {}),
        "parallel": {
            "processes": mesh.world_size,
            "dp_replicate": mesh.dp_replicate,
            "dp_shard": mesh.dp_shard,
            "zero": config.parallel.zero,
            "blocks_per_unit": blocks_per_unit(
                config.parallel,
                config.model.dimensions[0],
                shards=mesh.num_shards,
                processes=mesh.world_size,
            ),
            "sp": mesh.sp,
            "ring": ring_size(config),
            "exchanged_mib_per_sample": {bucket: mib for bucket, (mib, _) in exchanged.items()},
            "ring_mib_per_sample": {bucket: mib for bucket, (_, mib) in exchanged.items()},
        },
        "compute": {
            "dtype": str(compute_dtype(config.parallel, mesh.device)).removeprefix("torch."),
            "compiled_blocks": is_compiled(config.parallel, mesh.device),
            "activation_checkpointing": config.parallel.checkpointing,
            "offload": config.parallel.offload,
            "kept_inputs": config.parallel.kept_inputs,
            "kernels": {
                f"{bucket.num_frames}x{bucket.height}x{bucket.width}": kernels_by_layer(
                    config, latents_of_bucket(video_encoder, bucket), mesh.device
                )
                for bucket in config.data.buckets
            },
            "kernels_ruled_out": {" ".join(choice): why for choice, why in ruled_out().items()},
        },
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
