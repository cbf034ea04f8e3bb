"""Whether the parts of a run fit each other: found out before anything is trained."""

from __future__ import annotations

from typing import Literal

import numpy as np

from longtake.config.run import RunConfig
from longtake.data import Manifest
from longtake.diffusion import Objective, build_sampler
from longtake.encoders import TextEncoder, VideoEncoder
from longtake.training import learning_rate

Condition = Literal["label", "text"]


def check_parts(
    config: RunConfig,
    *,
    condition: Condition,
    objective: Objective,
    video_encoder: VideoEncoder,
    text_encoder: TextEncoder | None,
) -> None:
    """Whether the model, which wants `condition`, fits the parts it will meet.

    Raises: ValueError naming both sides of a mismatch and the setting that mends it.
    """
    model = config.model
    channels = video_encoder.latent_channels
    if model.in_channels != channels:
        raise ValueError(
            f"model.in_channels={model.in_channels}, but the {config.video_encoder.kind} video "
            f"encoder gives {channels} channels: set model.in_channels={channels}"
        )
    if model.learn_sigma != objective.learn_sigma:
        raise ValueError(
            f"model.learn_sigma={model.learn_sigma} does not go with diffusion.objective="
            f"{config.diffusion.objective}: set model.learn_sigma={objective.learn_sigma}"
        )
    if condition == "label" and text_encoder is not None:
        raise ValueError(
            f"model.name={model.name} is conditioned on labels: set text_encoder.kind=none"
        )
    if condition == "text":
        _check_text(config, text_encoder)
    for bucket in config.data.buckets:
        video_encoder.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    # Raises if the decay does not fit behind the warm-up.
    learning_rate(
        config.train.steps - 1,
        config.schedule,
        peak=config.optimizer.lr,
        total_steps=config.train.steps,
    )
    _check_sampling(config, condition, objective, video_encoder)


def check_conditions(manifest: Manifest, config: RunConfig, condition: Condition) -> None:
    """Whether the manifest says what the model is conditioned on.

    Raises: ValueError naming the manifest and the first line that does not.
    """
    if condition == "text":
        if not any(manifest.texts["caption"]):
            raise ValueError(
                f"{manifest.file} has no captions, but model.name={config.model.name} is "
                "conditioned on text: add a column caption, or use model.name=dit or latte"
            )
        return
    labels, num_classes = manifest.integers["label"], config.model.num_classes
    for wrong, what in (
        (labels < 0, "without a label"),
        (labels >= num_classes, f"with a label above {num_classes - 1}"),
    ):
        if wrong.any():
            first = manifest.lines[np.flatnonzero(wrong)[0]]
            raise ValueError(
                f"{manifest.file} has {wrong.sum()} of {len(labels)} samples {what}, the first in "
                f"line {first}, but model.name={config.model.name} with model.num_classes="
                f"{num_classes} needs labels from 0 to {num_classes - 1}"
            )


def _check_text(config: RunConfig, text_encoder: TextEncoder | None) -> None:
    model = config.model
    if text_encoder is None:
        raise ValueError(
            f"model.name={model.name} is conditioned on text: set text_encoder.kind to t5, umt5 or "
            "hashed-words"
        )
    wanted = (model.max_caption_tokens, model.caption_channels)
    given = (text_encoder.max_tokens, text_encoder.channels)
    if wanted != given:
        raise ValueError(
            f"model.max_caption_tokens={wanted[0]} and model.caption_channels={wanted[1]}, but the "
            f"{config.text_encoder.kind} text encoder gives {given[0]} tokens of {given[1]} "
            "channels: make them equal"
        )


def _check_sampling(
    config: RunConfig, condition: Condition, objective: Objective, video_encoder: VideoEncoder
) -> None:
    """Sampling comes late in a run; its mistakes must not."""
    settings, bucket = config.sampling, config.data.buckets[0]
    _, frames, _, _ = video_encoder.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    build_sampler(
        settings.sampler, objective, num_frames=frames, height=bucket.height, width=bucket.width
    )
    guided, channels = settings.sampler.guidance_channels, video_encoder.latent_channels
    if guided is not None and not 1 <= guided <= channels:
        raise ValueError(
            f"sampling.sampler.guidance_channels={guided} must be from 1 to the {channels} "
            "channels of the latents; None guides them all"
        )
    unused = "prompts" if condition == "label" else "labels"
    if getattr(settings, unused):
        used = "labels" if condition == "label" else "prompts"
        raise ValueError(
            f"sampling.{unused} has no effect: model.name={config.model.name} is sampled with "
            f"sampling.{used}"
        )
    last = config.model.num_classes - 1
    if bad := [label for label in settings.labels if not 0 <= label <= last]:
        raise ValueError(f"sampling.labels has {bad[0]}: labels go from 0 to {last}")
