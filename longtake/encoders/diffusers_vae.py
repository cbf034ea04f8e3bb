"""Autoencoders of diffusers as video encoders, with pretrained or with random weights.

Image classes see the frames of all clips in slices; causal video classes see whole clips. Both
return the statistics of the posterior; drawing from it and normalizing happen in `finish`, from
noise that the caller gives.

Shapes: B batch, C channels, T frames, H W height and width; F = frames of several clips in one
dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from longtake.encoders.autoencoders import Autoencoder, find_autoencoder
from longtake.encoders.memory import count_that_fits, peak_bytes
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
from longtake.encoders.protocol import (
    LatentStats,
    check_pixels,
    sample_posterior,
    to_unit_range,
)
from longtake.encoders.public_configs import AUTOENCODER_CONFIGS
from longtake.randomness import named_seed

log = logging.getLogger(__name__)

# Pixels per call where nothing was measured: 16 frames of 512x512. The widest activations (128
# channels at full resolution) then take 1 GiB in bf16.
_PIXELS_PER_CALL = 2**22
# Whatever memory allows: so many pixels times those 128 channels are the 2**31 elements that some
# kernels can index.
_MOST_PIXELS_PER_CALL = 2**24


class DiffusersVideoEncoder:
    """A frozen diffusers autoencoder behind the video encoder's protocol."""

    def __init__(
        self,
        vae: Any,
        traits: Autoencoder,
        *,
        frames_per_call: int,
        memory_gib: float,
        tile: int | None,
        provenance: dict[str, object],
    ) -> None:
        self._vae = vae
        self._traits = traits
        self._frames_per_call = frames_per_call
        self._memory_gib = memory_gib
        self._measured: dict[tuple[int, int, int], int] = {}
        self._memory_format = torch.contiguous_format
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
        at_once = self._items_per_call(pixels_BCTHW)
        moments_BCTHW = self._in_slices(self._moments, pixels_BCTHW, at_once)
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
        at_once = self._by_size(clip)
        pixels_BCTHW = self._in_slices(self._pixels, raw_BCTHW.to(self._vae.dtype), at_once)
        return pixels_BCTHW.float().clamp(-1, 1)

    @property
    def network(self) -> nn.Module | None:
        """What may be compiled: the network from a frame to its moments. None where a class does
        more than call one, as those of clips do."""
        return self._vae.encoder if self._traits.temporal is None else None

    def set_channels_last(self) -> None:
        """Weights and frames with channels innermost; for classes of single frames."""
        assert self._traits.temporal is None, "clips have one dimension too many"
        self._memory_format = torch.channels_last
        self._vae.to(memory_format=torch.channels_last)

    def _moments(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance side by side in the channels, or latents alone."""
        pixels = to_unit_range(pixels).to(self._vae.dtype, memory_format=self._memory_format)
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
        self, function: Callable[[Tensor], Tensor], x_BCTHW: Tensor, at_once: int
    ) -> Tensor:
        """The function over slices of at most so many items: frames, or whole clips of a class of
        clips. They are equally long, the last filled up with zeros: one shape is compiled."""
        is_by_frame = self._traits.temporal is None
        items = rearrange(x_BCTHW, "b c t h w -> (b t) c h w") if is_by_frame else x_BCTHW
        size = -(-len(items) // -(-len(items) // at_once))
        done = []
        for part in items.split(size):
            missing = part.new_zeros(size - len(part), *part.shape[1:])
            done.append(function(torch.cat((part, missing)))[: len(part)])
        y = torch.cat(done)
        return rearrange(y, "(b t) c h w -> b c t h w", b=len(x_BCTHW)) if is_by_frame else y

    def _items_per_call(self, pixels_BCTHW: Tensor) -> int:
        """How many frames, or clips of a class of clips, are encoded at once; measured once for
        each size."""
        num_frames, height, width = pixels_BCTHW.shape[2:]
        device = pixels_BCTHW.device
        if self._frames_per_call or device.type != "cuda":
            return self._by_size((num_frames, height, width))
        is_by_frame = self._traits.temporal is None
        frames = 1 if is_by_frame else num_frames
        if (frames, height, width) not in self._measured:
            items = pixels_BCTHW[:1, :, :1, :, :].flatten(1, 2) if is_by_frame else pixels_BCTHW[:1]
            self._measured[frames, height, width] = self._measure(items, frames * height * width)
        return self._measured[frames, height, width]

    def _measure(self, item: Tensor, pixels: int) -> int:
        # Eager, which takes no less than compiled, and compiles nothing for two shapes of no use.
        with torch.compiler.set_stance("force_eager"):
            self._moments(item)  # what the first call of all takes is not of a frame's
            one, two = (
                peak_bytes(
                    lambda count=count: self._moments(torch.cat([item] * count)), item.device
                )
                for count in (1, 2)
            )
        size = "x".join(map(str, item.shape[-2:]))
        what = f"frame of {size}" if item.ndim == 4 else f"clip of {item.shape[2]}x{size}"
        count = count_that_fits(one=one, two=two, limit_gib=self._memory_gib, what=what)
        count = max(1, min(count, _MOST_PIXELS_PER_CALL // pixels))
        log.info(
            "one %s takes %.2f GiB to encode: at most %d at once", what, (two - one) / 2**30, count
        )
        return count

    def _by_size(self, clip: tuple[int, int, int]) -> int:
        """Frames, or clips of a class of clips, by their frames, height and width in pixels."""
        num_frames, height, width = clip
        at_once = self._frames_per_call or max(1, _PIXELS_PER_CALL // (height * width))
        return at_once if self._traits.temporal is None else max(1, at_once // num_frames)


def load_diffusers_vae(
    class_name: str,
    path: str,
    *,
    subfolder: str | None,
    revision: str | None,
    weights: str,
    dtype: str,
    frames_per_call: int,
    memory_gib: float,
    tile: int | None,
    device: torch.device,
    seed: int,
) -> DiffusersVideoEncoder:
    """An autoencoder of diffusers, frozen, on the device; arguments as in `VideoEncoderConfig`."""
    if not memory_gib > 0:
        raise ValueError(f"memory_gib={memory_gib:g} must be above 0: 4 is usual")
    if frames_per_call < 0:
        raise ValueError(
            f"frames_per_call={frames_per_call} must be positive, or 0 to go by memory_gib"
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
        memory_gib=memory_gib,
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
