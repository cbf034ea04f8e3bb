"""Random data of a configuration's shapes, of a fixed seed, without zeros.

Zeros would be a lie: a GPU that multiplies them draws less power and runs faster.

Letters: B batch, C channels, T frames, H W height and width, L text tokens, K their width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from longtake.config import RunConfig, with_encoder_weights
from longtake.data import Batch, Bucket
from longtake.encoders import VideoEncoder, build_video_encoder
from longtake.encoders.autoencoders import find_autoencoder
from longtake.encoders.public_configs import AUTOENCODER_CONFIGS
from longtake.models import Model
from longtake.parallel import Mesh, compute_dtype
from longtake.pipeline import Inputs
from longtake.pipeline.inputs import size_condition
from longtake.planning import latent_size
from longtake.randomness import SampleKeys, named_seed
from longtake.store import EncodedBatch, make_recipe, stored_encoders

_Samples = TypeVar("_Samples", Batch, EncodedBatch)

# Steps take these in turn: other samples, so other timesteps and noise, on the same pixels.
NUM_BATCHES = 4

_SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "sa", "to", "ve")


def latent_shape(config: RunConfig, bucket: Bucket) -> tuple[int, int, int, int]:
    """A sample's latents (C, T, H, W), without building a pretrained encoder where its public
    configuration tells."""
    encoder = config.video_encoder
    size = (bucket.num_frames, bucket.height, bucket.width)
    class_name, known = AUTOENCODER_CONFIGS.get(encoder.path, ("", {}))
    if encoder.kind == "diffusers" and encoder.class_name == class_name == "AutoencoderKL":
        blocks = known["block_out_channels"]
        assert isinstance(blocks, tuple)
        factor = 2 ** (len(blocks) - 1)
        return _int(known["latent_channels"]), *latent_size(*size, downsample=(1, factor, factor))
    if encoder.kind == "diffusers" and encoder.class_name == class_name == "AutoencoderKLWan":
        factor = _int(known["scale_factor_spatial"])
        downsample = (_int(known["scale_factor_temporal"]), factor, factor)
        return _int(known["z_dim"]), *latent_size(*size, downsample=downsample, causal=True)
    unread = with_encoder_weights(config, "random").video_encoder
    return build_video_encoder(unread, "cpu").latent_shape(*size)


def random_inputs(
    config: RunConfig,
    model: Model,
    bucket: Bucket,
    latents: tuple[int, int, int, int],
    *,
    micro_batch: int,
    mesh: Mesh,
    seed: int,
) -> list[Inputs]:
    """Micro-batches as encoders would give them: latents, and captions of full length or labels."""
    device = mesh.device
    generator = torch.Generator(device)
    generator.manual_seed(named_seed(seed, f"benchmark/inputs/{mesh.dp_rank}"))

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    if model.condition == "label":
        high = config.model.num_classes
        labels_B = torch.randint(high, (micro_batch,), generator=generator, device=device)
        condition = {"labels_B": labels_B}
    else:
        tokens, width = config.model.max_caption_tokens, config.model.caption_channels
        dtype = compute_dtype(config.parallel, device)
        condition = {
            "prompt_embeds_BLK": normal(micro_batch, tokens, width, dtype=dtype),
            "prompt_mask_BL": torch.ones(micro_batch, tokens, dtype=torch.bool, device=device),
        }
    if config.model.micro_conditioning:
        condition |= size_condition(micro_batch, bucket.height, bucket.width, device)
    inputs = Inputs(
        clean_BCTHW=normal(micro_batch, *latents),
        condition=condition,
        keys=_keys(0, micro_batch, mesh, seed),
        pixel_size=(bucket.height, bucket.width),
        weights_B=torch.ones(micro_batch, device=device),
    )
    return [
        replace(inputs, keys=_keys(turn, micro_batch, mesh, seed).to(device))
        for turn in range(NUM_BATCHES)
    ]


def random_batches(
    config: RunConfig, bucket: Bucket, number: int, *, micro_batch: int, mesh: Mesh, seed: int
) -> list[Batch]:
    """Micro-batches as the loader would give them: noise as pixels, made-up words as captions.

    They lie in pinned host memory, decoded: what a step does not contain is decoding.
    """
    chosen = named_seed(seed, f"benchmark/batches/{mesh.dp_rank}")
    generator = torch.Generator().manual_seed(chosen)
    shape = (micro_batch, 3, bucket.num_frames, bucket.height, bucket.width)
    words = random.Random(chosen)
    keys = _keys(0, micro_batch, mesh, seed)
    batch = Batch(
        pixels_BCTHW=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        captions=[_caption(words, config.text_encoder.max_tokens) for _ in range(micro_batch)],
        labels_B=torch.randint(config.model.num_classes, (micro_batch,), generator=generator),
        epochs_B=keys.epochs_B,
        sample_ids_B=keys.sample_ids_B,
        weights_B=torch.ones(micro_batch),
        bucket=number,
    )
    return _turns(batch, micro_batch, mesh, seed)


def random_encoded_batches(
    config: RunConfig,
    model: Model,
    bucket: Bucket,
    number: int,
    latents: tuple[int, int, int, int],
    *,
    micro_batch: int,
    mesh: Mesh,
    seed: int,
) -> list[EncodedBatch]:
    """Micro-batches as a latent store gives them: bf16 statistics and embeddings of full length.

    They lie in pinned host memory: what a step does not contain is reading.
    """
    generator = torch.Generator()
    generator.manual_seed(named_seed(seed, f"benchmark/encoded/{mesh.dp_rank}"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tokens, width = config.model.max_caption_tokens, config.model.caption_channels
    has_text = model.condition == "text"
    keys = _keys(0, micro_batch, mesh, seed)
    batch = EncodedBatch(
        mean_BCTHW=normal(micro_batch, *latents),
        # A posterior as narrow as that of Stable Diffusion's autoencoder.
        logvar_BCTHW=normal(micro_batch, *latents) - 10 if _has_posterior(config) else None,
        embeds_BLK=normal(micro_batch, tokens, width) if has_text else None,
        mask_BL=torch.ones(micro_batch, tokens, dtype=torch.bool) if has_text else None,
        pixel_size=(bucket.height, bucket.width),
        captions=[""] * micro_batch,
        labels_B=torch.randint(config.model.num_classes, (micro_batch,), generator=generator),
        epochs_B=keys.epochs_B,
        sample_ids_B=keys.sample_ids_B,
        weights_B=torch.ones(micro_batch),
        bucket=number,
    )
    return _turns(batch, micro_batch, mesh, seed)


def stored_video_encoder(config: RunConfig, device: torch.device) -> VideoEncoder:
    """The video encoder of a run that reads a store: scale and shapes without the weights."""
    video = with_encoder_weights(config, "random").video_encoder
    recipe = make_recipe(
        replace(config.data, crop="center"),
        video_config=video,
        video_encoder=build_video_encoder(video, "cpu"),
        text_config=config.text_encoder,
        text_encoder=None,
    )
    stored, _ = stored_encoders(recipe, video, config.text_encoder, device, config.seed)
    return stored


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value


def _has_posterior(config: RunConfig) -> bool:
    video = config.video_encoder
    return video.kind == "diffusers" and find_autoencoder(video.class_name).output == "latent_dist"


def with_buckets(config: RunConfig, texts: Sequence[str]) -> RunConfig:
    """The configuration with more buckets, as large in pixels as the first as samples allow."""
    first = config.data.buckets[0]
    buckets = list(config.data.buckets)
    pixels = first.batch_size * first.num_frames * first.height * first.width
    for text in texts:
        sizes = text.split("x")
        if len(sizes) != 3 or not all(size.isdigit() for size in sizes):
            raise ValueError(f"--also-bucket {text}: expected frames x height x width, 16x512x512")
        frames, height, width = map(int, sizes)
        batch_size = max(1, pixels // max(1, frames * height * width))
        bucket = replace(
            first, num_frames=frames, height=height, width=width, batch_size=batch_size
        )
        buckets.append(bucket)
    return replace(config, data=replace(config.data, buckets=tuple(buckets)))


def _turns(batch: _Samples, micro_batch: int, mesh: Mesh, seed: int) -> list[_Samples]:
    """The batch under other sample ids in each turn, in pinned memory on CUDA."""
    is_pinned = mesh.device.type == "cuda"
    batch = batch.pin_memory() if is_pinned else batch
    turns = [_keys(turn, micro_batch, mesh, seed).sample_ids_B for turn in range(NUM_BATCHES)]
    return [replace(batch, sample_ids_B=ids.pin_memory() if is_pinned else ids) for ids in turns]


def _keys(turn: int, micro_batch: int, mesh: Mesh, seed: int) -> SampleKeys:
    first = (turn * mesh.dp_size + mesh.dp_rank) * micro_batch
    ids_B = torch.arange(first, first + micro_batch)
    return SampleKeys(seed, torch.zeros(micro_batch, dtype=torch.int64), ids_B)


def _caption(words: random.Random, tokens: int) -> str:
    """At least as many tokens as an encoder takes: every word is one or more."""
    return " ".join("".join(words.choices(_SYLLABLES, k=2)) for _ in range(tokens))
