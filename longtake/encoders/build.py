"""Encoders from their configuration; pretrained libraries are imported only when one is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from longtake.encoders.dct import DctEncoder
from longtake.encoders.hashed_words import HashedWordsEncoder
from longtake.encoders.protocol import TextEncoder, VideoEncoder

Weights = Literal["pretrained", "random"]
DtypeName = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class VideoEncoderConfig:
    """Pixels to latents: `dct` needs no weights, `diffusers` is an autoencoder of that library."""

    kind: Literal["dct", "diffusers"] = "dct"

    class_name: str = "AutoencoderKL"
    """Class in diffusers. Only for `diffusers`, like everything down to `tile`."""
    path: str = "stabilityai/sd-vae-ft-ema"
    """Folder with config.json and safetensors weights, or a name on the Hugging Face hub."""
    subfolder: str | None = None
    """Where in `path` the autoencoder lies, usually `vae` in a pipeline's folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    weights: Weights = "pretrained"
    """`random` builds the same class from its config, off-line: for benchmarks and tests."""
    dtype: DtypeName = "auto"
    """`auto` is bf16 on CUDA and fp32 on the CPU; fp16 is refused where it overflows."""
    frames_per_call: int = 0
    """At most this many frames per call (video classes: whole clips); 0: as `memory_gib` holds."""
    memory_gib: float = 4.0
    """Device memory that one call of the encoder may take beside its weights. What a frame needs is
    measured on CUDA once for each size; elsewhere calls go by the size of frames."""
    compile: bool | None = None
    """torch.compile of the encoder in training; None: on CUDA, for classes of single frames."""
    channels_last: bool | None = None
    """Whether channels lie innermost in memory; None: where the encoder is compiled, since compiled
    normalizations take them as they lie and the library's own copy."""
    tile: int | None = None
    """Frames higher or wider than this many pixels are processed in blended tiles of this size."""

    dct_block: int = 8
    """Side of a DCT block in pixels: the downsampling. Only for `dct`, like the next three."""
    dct_luma_channels: int = 16
    dct_chroma_channels: int = 4
    """Kept coefficients of each of the two chroma components."""
    dct_whitening: float = 1.0
    """1: all channels of unit variance; 0: the spectrum of images, where large forms dominate."""


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Captions to embeddings: `none` for labels; `hashed-words` needs no weights."""

    kind: Literal["none", "hashed-words", "t5", "umt5"] = "none"

    max_tokens: int = 120
    """Every caption is padded or cut to this many tokens; 120 is usual for T5, 512 for UMT5."""
    channels: int = 64
    """Width of a hashed word's vector. Only for `hashed-words`; the others know their own."""

    path: str = "DeepFloyd/t5-v1_1-xxl"
    """Folder with config.json and safetensors weights, or a hub name. From here on only T5s."""
    subfolder: str | None = None
    """Where in `path` the encoder lies, usually `text_encoder` in a pipeline's folder."""
    tokenizer_path: str | None = None
    """Folder or hub name of the tokenizer, if it is not `path`."""
    tokenizer_subfolder: str | None = None
    """Where the tokenizer lies, usually `tokenizer` in a pipeline's folder."""
    revision: str | None = None
    weights: Weights = "pretrained"
    """`random` builds the same class from its config, off-line: for benchmarks and tests."""
    dtype: DtypeName = "auto"
    """`auto` is bf16 on CUDA and fp32 on the CPU; T5's activations overflow in fp16: refused."""
    num_lengths: int = 4
    """T5 runs on as many tokens as the longest caption of a call has, rounded up to one of so many
    parts of `max_tokens`; what the transformer sees is padded in full. 1: always all of them."""
    compile: bool | None = None
    """torch.compile of every block in training, once for each number of captions and tokens; None
    means on CUDA only."""
    placement: Literal["auto", "replicated", "sharded"] = "auto"
    """Whether every process holds T5 or they share one copy (FSDP); `auto` replicates it if its
    weights take no more than a quarter of the device's memory."""


def build_video_encoder(
    config: VideoEncoderConfig, device: torch.device | str, seed: int = 0
) -> VideoEncoder:
    """The configured video encoder, on the device. The seed decides random weights only."""
    if config.kind == "dct":
        return DctEncoder(
            block=config.dct_block,
            luma_channels=config.dct_luma_channels,
            chroma_channels=config.dct_chroma_channels,
            whitening=config.dct_whitening,
            device=device,
        )
    if config.kind == "diffusers":
        from longtake.encoders.diffusers_vae import load_diffusers_vae

        return load_diffusers_vae(
            config.class_name,
            config.path,
            subfolder=config.subfolder,
            revision=config.revision,
            weights=config.weights,
            dtype=config.dtype,
            frames_per_call=config.frames_per_call,
            memory_gib=config.memory_gib,
            tile=config.tile,
            device=torch.device(device),
            seed=seed,
        )
    raise ValueError(f"video encoder kind={config.kind!r} is unknown: use 'dct' or 'diffusers'")


def build_text_encoder(
    config: TextEncoderConfig, device: torch.device | str, seed: int = 0
) -> TextEncoder | None:
    """The configured text encoder, on the device; None if the run is conditioned on labels."""
    if config.kind == "none":
        return None
    if config.kind == "hashed-words":
        return HashedWordsEncoder(
            channels=config.channels, max_tokens=config.max_tokens, device=device
        )
    if config.kind in ("t5", "umt5"):
        from longtake.encoders.t5 import load_t5

        return load_t5(
            config.kind,
            config.path,
            subfolder=config.subfolder,
            tokenizer_path=config.tokenizer_path,
            tokenizer_subfolder=config.tokenizer_subfolder,
            revision=config.revision,
            max_tokens=config.max_tokens,
            num_lengths=config.num_lengths,
            weights=config.weights,
            dtype=config.dtype,
            device=torch.device(device),
            seed=seed,
        )
    raise ValueError(
        f"text encoder kind={config.kind!r} is unknown: use 'none', 'hashed-words', 't5' or 'umt5'"
    )
