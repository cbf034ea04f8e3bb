"""Autoencoders of diffusers as video encoders, with pretrained or with random weights.

Image classes see the frames of all clips in slices; causal video classes see whole clips. Both
return the statistics of the posterior; drawing from it and normalizing happen in `finish`, from
noise that the caller gives.

Shapes: B batch, C channels, T frames, H W height and width; F = frames of several clips in one
dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from longtake.encoders.autoencoders import Autoencoder, find_autoencoder
from longtake.encoders.pretrained import (
    LOAD_ERRORS,
    Source,
    check_complete,
    config_digest,
    freeze,
    import_library,
    load_failure,
    locate,
    resolve_dtype,
    seeded,
    weights_digest,
)
from longtake.encoders.protocol import LatentStats, check_pixels, sample_posterior
from longtake.encoders.public_configs import AUTOENCODER_CONFIGS
from longtake.randomness import named_seed

# Pixels per call if `frames_per_call` is 0: 16 frames of 512x512. The widest activations (128
# channels at full resolution) then take 1 GiB in bf16 and stay far below the 2**31 elements that
# some kernels can index.
_PIXELS_PER_CALL = 2**22


class DiffusersVideoEncoder:
    """A frozen diffusers autoencoder behind the video encoder's protocol."""

    def __init__(
        self,
        vae: Any,
        traits: Autoencoder,
        *,
        frames_per_call: int,
        tile: int | None,
        provenance: dict[str, object],
    ) -> None:
        self._vae = vae
        self._traits = traits
        self._frames_per_call = frames_per_call
        self.latent_channels: int = vae.config[traits.channels]
        spatial = traits.spatial(vae)
        temporal = traits.temporal(vae) if traits.temporal else 1
        self.downsample: tuple[int, int, int] = (temporal, spatial, spatial)
        mean, scale = traits.normalization(vae)
        assert len(mean) == len(scale) == self.latent_channels, (
            f"{len(mean)} means and {len(scale)} scales for {self.latent_channels} channels"
        )
        self.latent_mean, self.latent_scale = mean, scale
        self._mean_C111 = torch.tensor(mean, device=vae.device).view(-1, 1, 1, 1)
        self._scale_C111 = torch.tensor(scale, device=vae.device).view(-1, 1, 1, 1)
        if tile is not None:
            _set_tile(vae, traits, tile, spatial)
        self.provenance: dict[str, object] = provenance | {
            "dtype": str(vae.dtype).removeprefix("torch."),
            "config_sha256": config_digest(vae.config),
            "weights_sample_sha256": weights_digest(vae),
            "latent_mean": mean,
            "latent_scale": scale,
            "tile": tile,
        }

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The latents' (C, T, H, W).

        Raises:
            ValueError: the class cannot take this number of frames or this size.
        """
        name = self.provenance["class"]
        temporal, spatial, _ = self.downsample
        for axis, size in (("height", height), ("width", width)):
            if size < spatial or size % spatial:
                nearest = max(1, round(size / spatial)) * spatial
                raise ValueError(
                    f"{axis}={size} must be a multiple of {spatial} for {name}: use {nearest}"
                )
        if self._traits.temporal is None:
            return self.latent_channels, num_frames, height // spatial, width // spatial
        step = temporal * self._traits.clip_steps
        if num_frames < 1 or (num_frames - 1) % step:
            below = max(0, num_frames - 1) // step * step + 1
            raise ValueError(
                f"num_frames={num_frames} does not suit {name}, which takes 1 + {step}k frames: "
                f"use {below} or {below + step}"
            )
        latent_frames = 1 + (num_frames - 1) // temporal
        return self.latent_channels, latent_frames, height // spatial, width // spatial

    @torch.no_grad()
    def encode(self, pixels_BCTHW: Tensor) -> LatentStats:
        """Posterior mean and log-variance, un-normalized; of a deterministic class the latents."""
        check_pixels(pixels_BCTHW)
        num_frames, height, width = pixels_BCTHW.shape[2:]
        self.latent_shape(num_frames, height, width)
        moments_BCTHW = self._in_slices(
            self._moments, pixels_BCTHW.to(self._vae.dtype), (num_frames, height, width)
        )
        if self._traits.output != "latent_dist":
            return LatentStats(moments_BCTHW)
        mean_BCTHW, logvar_BCTHW = moments_BCTHW.chunk(2, dim=1)
        return LatentStats(mean_BCTHW, logvar_BCTHW)

    def finish(self, stats: LatentStats, noise_BCTHW: Tensor | None = None) -> Tensor:
        """(posterior sample - mean) * scale with the class's constants, in float32."""
        return (sample_posterior(stats, noise_BCTHW) - self._mean_C111) * self._scale_C111

    @torch.no_grad()
    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Pixels, float32, clamped to [-1, 1]."""
        raw_BCTHW = latents_BCTHW.float() / self._scale_C111 + self._mean_C111
        temporal, spatial, _ = self.downsample
        latent_frames, height, width = raw_BCTHW.shape[2:]
        clip = (1 + (latent_frames - 1) * temporal, height * spatial, width * spatial)
        pixels_BCTHW = self._in_slices(self._pixels, raw_BCTHW.to(self._vae.dtype), clip)
        return pixels_BCTHW.float().clamp(-1, 1)

    def _moments(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance side by side in the channels, or latents alone."""
        result = getattr(self._vae.encode(pixels), self._traits.output)
        if self._traits.output != "latent_dist":
            return result
        return torch.cat((result.mean, result.logvar), dim=1)

    def _pixels(self, raw: Tensor) -> Tensor:
        if getattr(self._vae.config, "timestep_conditioning", False):
            # Later LTX decoders finish the denoising themselves; 0 says that nothing is left to
            # remove.
            return self._vae.decode(raw, temb=raw.new_zeros(raw.shape[0])).sample
        return self._vae.decode(raw).sample

    def _in_slices(
        self, function: Callable[[Tensor], Tensor], x_BCTHW: Tensor, clip: tuple[int, int, int]
    ) -> Tensor:
        """The function over slices of at most `frames_per_call` frames, or of whole clips.

        `clip` is a clip's frames, height and width in pixels, whether they are read or made.
        """
        num_frames, height, width = clip
        at_once = self._frames_per_call or max(1, _PIXELS_PER_CALL // (height * width))
        if self._traits.temporal is None:
            slices = rearrange(x_BCTHW, "b c t h w -> (b t) c h w").split(at_once)
            y_FCHW = torch.cat([function(part) for part in slices])
            return rearrange(y_FCHW, "(b t) c h w -> b c t h w", b=len(x_BCTHW))
        clips_at_once = max(1, at_once // num_frames)
        return torch.cat([function(part) for part in x_BCTHW.split(clips_at_once)])


def load_diffusers_vae(
    class_name: str,
    path: str,
    *,
    subfolder: str | None,
    revision: str | None,
    weights: str,
    dtype: str,
    frames_per_call: int,
    tile: int | None,
    device: torch.device,
    seed: int,
) -> DiffusersVideoEncoder:
    """An autoencoder of diffusers, frozen, on the device; arguments as in `VideoEncoderConfig`."""
    if frames_per_call < 0:
        raise ValueError(
            f"frames_per_call={frames_per_call} must be positive, or 0 to go by the frames' size"
        )
    traits = find_autoencoder(class_name)
    diffusers = import_library("diffusers")
    source = locate(path, subfolder, revision)
    autoencoder_class = getattr(diffusers, class_name)
    torch_dtype = resolve_dtype(dtype, device)
    config = _read_config(autoencoder_class, source, weights)
    _check_fp16(class_name, traits, config, torch_dtype)
    if weights == "random":
        with seeded(device, named_seed(seed, f"encoders/{class_name}")):
            vae = autoencoder_class.from_config(config)
        # Not the library's own `to`, which warns of fp32 islands that these classes do not have.
        vae = nn.Module.to(vae, dtype=torch_dtype)
    else:
        vae = _load_weights(autoencoder_class, source, torch_dtype).to(device)
    freeze(vae)
    return DiffusersVideoEncoder(
        vae,
        traits,
        frames_per_call=frames_per_call,
        tile=tile,
        provenance={
            "class": class_name,
            "library": f"diffusers {diffusers.__version__}",
            **source.describe(),
            "weights": weights,
        },
    )


def _read_config(autoencoder_class: Any, source: Source, weights: str) -> dict[str, Any]:
    """The class's config from the source, or from our table for random weights by a hub name."""
    class_name = autoencoder_class.__name__
    if weights == "random" and source.folder is None:
        known = [name for name, row in AUTOENCODER_CONFIGS.items() if row[0] == class_name]
        if source.name not in known:
            raise ValueError(
                f"no config of {class_name} is known under the name {source.name!r} to build "
                f"random weights from: use {' or '.join(known)}, or a folder with config.json"
            )
        return dict(AUTOENCODER_CONFIGS[source.name][1])
    try:
        config = autoencoder_class.load_config(source.name, **source.options)
    except LOAD_ERRORS as error:
        raise load_failure(class_name, source, error) from error
    if config.get("_class_name", class_name) != class_name:
        raise ValueError(
            f"{source.name!r} holds an autoencoder of class {config['_class_name']}, "
            f"not {class_name}: set class_name to {config['_class_name']}"
        )
    return config


def _load_weights(autoencoder_class: Any, source: Source, dtype: torch.dtype) -> Any:
    class_name = autoencoder_class.__name__
    try:
        vae, loading_info = autoencoder_class.from_pretrained(
            source.name,
            torch_dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **source.options,
        )
    except LOAD_ERRORS as error:
        raise load_failure(class_name, source, error) from error
    check_complete(class_name, source, loading_info)
    return vae


def _check_fp16(
    class_name: str, traits: Autoencoder, config: dict[str, Any], dtype: torch.dtype
) -> None:
    if dtype != torch.float16 or traits.fp16 == "works":
        return
    if traits.fp16 == "unless force_upcast" and config.get("force_upcast", True) is False:
        return
    raise ValueError(
        f"{class_name} overflows in fp16 (its config does not say force_upcast=false): "
        "use dtype bf16 or fp32"
    )


def _set_tile(vae: Any, traits: Autoencoder, tile: int, spatial: int) -> None:
    """Tiles of `tile` pixels that overlap by a quarter."""
    name = type(vae).__name__
    if traits.tile_setter is None:
        raise ValueError(f"{name} cannot work in tiles: leave tile unset")
    # Tiles and their strides of three quarters must start on whole latents.
    if tile < 4 * spatial or tile % (4 * spatial):
        nearest = max(1, round(tile / (4 * spatial))) * 4 * spatial
        raise ValueError(
            f"tile={tile} must be a multiple of {4 * spatial} pixels for {name}: use {nearest}"
        )
    traits.tile_setter(vae, tile)
