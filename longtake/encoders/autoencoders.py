"""The autoencoder classes of diffusers that we know: how each is normalized, sized and tiled.

Each class keeps the scale and shift of its latents in another place, and applying the wrong ones
trains a model that no pipeline can use. A class that is not in this table is refused rather than
guessed. All rules have one form:

    latents = (raw - mean) * scale          per channel

Source: what the pipelines of diffusers 0.42 do before their transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Normalization = tuple[list[float], list[float]]  # mean and scale, one value per channel


@dataclass(frozen=True)
class Autoencoder:
    """What differs between the classes; functions read it from a built model."""

    normalization: Callable[[Any], Normalization]
    spatial: Callable[[Any], int]
    """Pixels per latent in height and width."""
    temporal: Callable[[Any], int] | None = None
    """Frames per latent frame of a causal video class; None for image classes."""
    clip_steps: int = 1
    """Valid clips have 1 + k * temporal * clip_steps frames."""
    channels: str = "latent_channels"
    """The config's name for the number of latent channels."""
    output: Literal["latent_dist", "latents", "latent"] = "latent_dist"
    """The encoder's result: a posterior, or plain latents under one of two names."""
    fp16: Literal["overflows", "works", "unless force_upcast"] = "overflows"
    tile_setter: Callable[[Any, int], None] | None = None
    """Sets the side of tiles in pixels; they overlap by a quarter."""


def normalization_from_factors(vae: Any) -> Normalization:
    """(raw - shift_factor) * scaling_factor; with vectors as `normalization_from_buffers`."""
    config = vae.config
    channels = config.latent_channels
    mean = getattr(config, "latents_mean", None)
    std = getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        return list(mean), [config.scaling_factor / value for value in std]
    shift = getattr(config, "shift_factor", None) or 0.0
    return [shift] * channels, [config.scaling_factor] * channels


def normalization_from_vectors(vae: Any) -> Normalization:
    """(raw - latents_mean) / latents_std, both in the config."""
    return list(vae.config.latents_mean), [1 / value for value in vae.config.latents_std]


def normalization_from_buffers(vae: Any) -> Normalization:
    """(raw - latents_mean) * scaling_factor / latents_std, the vectors stored with the weights."""
    scale = vae.config.scaling_factor / vae.latents_std.double()
    return vae.latents_mean.double().tolist(), scale.tolist()


def _doublings(vae: Any) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _ratio(vae: Any) -> int:
    return vae.spatial_compression_ratio


def _temporal_ratio(vae: Any) -> int:
    return int(vae.config.temporal_compression_ratio)


def _tile_by_size(vae: Any, tile: int) -> None:
    vae.use_tiling = True
    vae.tile_sample_min_size = tile
    vae.tile_latent_min_size = tile // _doublings(vae)
    vae.tile_overlap_factor = 0.25


def _tile_by_stride(vae: Any, tile: int) -> None:
    vae.enable_tiling(
        tile_sample_min_height=tile,
        tile_sample_min_width=tile,
        tile_sample_stride_height=tile * 3 // 4,
        tile_sample_stride_width=tile * 3 // 4,
    )


def _tile_by_overlap(vae: Any, tile: int) -> None:
    vae.enable_tiling(
        tile_sample_min_height=tile,
        tile_sample_min_width=tile,
        tile_overlap_factor_height=0.25,
        tile_overlap_factor_width=0.25,
    )


AUTOENCODERS: dict[str, Autoencoder] = {
    # Images, frame by frame.
    "AutoencoderKL": Autoencoder(
        normalization=normalization_from_factors,
        spatial=_doublings,
        # Stable Diffusion XL's overflows in its decoder; the repaired one says force_upcast=false.
        fp16="unless force_upcast",
        tile_setter=_tile_by_size,
    ),
    "AutoencoderTiny": Autoencoder(
        normalization=normalization_from_factors,
        spatial=lambda vae: 2 ** (len(vae.config.encoder_block_out_channels) - 1),
        output="latents",
        fp16="works",
    ),
    "AutoencoderDC": Autoencoder(
        normalization=normalization_from_factors,
        spatial=_ratio,
        output="latent",
        tile_setter=_tile_by_stride,
    ),
    # Clips, causal in time: the first frame alone, then groups of `temporal` frames.
    "AutoencoderKLWan": Autoencoder(
        normalization=normalization_from_vectors,
        spatial=_ratio,
        temporal=lambda vae: vae.config.scale_factor_temporal,
        channels="z_dim",
        tile_setter=_tile_by_stride,
    ),
    "AutoencoderKLHunyuanVideo": Autoencoder(
        normalization=normalization_from_factors,
        spatial=_ratio,
        temporal=_temporal_ratio,
        fp16="works",
        tile_setter=_tile_by_stride,
    ),
    "AutoencoderKLCogVideoX": Autoencoder(
        normalization=normalization_from_factors,
        spatial=_doublings,
        temporal=_temporal_ratio,
        # Latent frames are decoded in pairs after the first: an even number of them gives too many
        # frames.
        clip_steps=2,
        fp16="unless force_upcast",
        tile_setter=_tile_by_overlap,
    ),
    "AutoencoderKLLTXVideo": Autoencoder(
        normalization=normalization_from_buffers,
        spatial=_ratio,
        temporal=lambda vae: vae.temporal_compression_ratio,
        tile_setter=_tile_by_stride,
    ),
}


def find_autoencoder(class_name: str) -> Autoencoder:
    """The table's row of a class; a ValueError that lists the known ones if there is none."""
    if class_name not in AUTOENCODERS:
        raise ValueError(
            f"autoencoder class {class_name!r} has no known rule for the scale and shift of its "
            f"latents: use one of {', '.join(AUTOENCODERS)}"
        )
    return AUTOENCODERS[class_name]
