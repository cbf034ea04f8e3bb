"""From prompts or labels to videos: initial noise, sampler, decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtake.diffusion import Objective, SamplerConfig, build_sampler, guided
from longtake.encoders import TextEncoder, VideoEncoder
from longtake.pipeline.inputs import size_condition, text_condition
from longtake.randomness import SampleKeys, Stream, normal


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate: one video per prompt, or per label for a label-conditioned model."""

    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    num_frames: int
    height: int  # pixels
    width: int
    seed: int = 0

    @property
    def captions(self) -> tuple[str, ...]:
        """What each video was asked to be, in words."""
        return self.prompts or tuple(f"label {label}" for label in self.labels)

    def __len__(self) -> int:
        return len(self.captions)


@torch.no_grad()
def generate(
    model: nn.Module,
    objective: Objective,
    request: Request,
    sampler: SamplerConfig,
    *,
    video_encoder: VideoEncoder,
    text_encoder: TextEncoder | None,
    device: torch.device,
    with_sizes: bool = False,
) -> Tensor:
    """Videos as uint8 (B, 3, T, H, W).

    Video number i depends on (seed, i) and its own prompt alone, not on its neighbours.
    """
    size = len(request)
    if text_encoder is None:
        condition = {"labels_B": torch.tensor(request.labels, device=device)}
    else:
        condition = text_condition(text_encoder, request.prompts)
    if with_sizes:
        condition |= size_condition(size, request.height, request.width, device)
    keys = SampleKeys(request.seed, torch.zeros(size, dtype=torch.int64), torch.arange(size)).to(
        device
    )
    shape = video_encoder.latent_shape(request.num_frames, request.height, request.width)
    noise_BCTHW = normal(keys, Stream.SAMPLER, shape)

    def step_noise(step: int) -> Tensor:
        # Epochs number the sampler's steps here; zero is the initial noise.
        step_keys = SampleKeys(keys.seed, keys.epochs_B + step + 1, keys.sample_ids_B)
        return normal(step_keys, Stream.SAMPLER, shape)

    predict = guided(
        model,
        condition,
        guidance_scale=sampler.guidance_scale,
        channels=sampler.guidance_channels,
        latent_channels=video_encoder.latent_channels,
    )
    draw = build_sampler(
        sampler,
        objective,
        num_frames=shape[1],
        height=request.height,
        width=request.width,
    )
    latents_BCTHW = draw(predict, noise_BCTHW, step_noise)
    # One video at a time: decoding is the memory peak of sampling.
    videos = [video_encoder.decode(latents_CTHW[None])[0] for latents_CTHW in latents_BCTHW]
    return torch.stack([to_uint8(video) for video in videos])


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as bytes."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
