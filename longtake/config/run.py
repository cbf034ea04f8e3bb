"""What a run is: the parts' own dataclasses composed, and the checks that need several of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from longtake.data import DataConfig
from longtake.diffusion import DiffusionConfig, Objective, SamplerConfig
from longtake.encoders import TextEncoder, TextEncoderConfig, VideoEncoder, VideoEncoderConfig
from longtake.models import ModelConfig
from longtake.parallel import ParallelConfig
from longtake.training import (
    CheckpointConfig,
    EmaConfig,
    MetricsConfig,
    OptimizerConfig,
    ScheduleConfig,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop's own numbers."""

    steps: int = 100_000
    """Optimizer steps of the whole run, resumed parts included."""
    accumulation: int = 1
    """Micro-batches per optimizer step and process; the batch size of a bucket stays what it is."""
    condition_dropout: float = 0.1
    """Share of samples trained without their caption or label, for classifier-free guidance."""
    init_from: str | None = None
    """Public weights to start from (file or folder, see `longtake convert`); None draws new."""
    log_every_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(
                f"train.condition_dropout={self.condition_dropout} must be in [0, 1): "
                "it is the share of samples trained without their condition"
            )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out loss at fixed timesteps with fixed noise."""

    manifest: str | None = None
    """Manifest of held-out samples; None: no validation."""
    every_steps: int = 1000
    """Steps between validations; the first comes before the first step, one more at the end."""
    max_samples: int = 64
    batch_size: int = 8
    """Samples per forward and process."""
    num_timesteps: int = 8
    """Equidistant timesteps at which every sample is evaluated."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Videos generated while training, and the defaults of `longtake sample`."""

    every_steps: int = 0
    """Steps between samples; 0: only at the end, if there are prompts or labels."""
    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    seed: int = 0
    frames_per_second: float = 8.0
    """Playing speed of the files written."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes. Saved as `config.yaml` beside its results."""

    name: str = "run"
    """The run's folder is `output/name`."""
    output: str = "runs"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    video_encoder: VideoEncoderConfig = field(default_factory=VideoEncoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def uses_random_encoders(self) -> bool:
        """Whether an encoder has random weights in place of pretrained ones: only a benchmark."""
        return "random" in (self.video_encoder.weights, self.text_encoder.weights)


def check_parts(
    config: RunConfig,
    *,
    condition: Literal["label", "text"],
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
    if condition == "label":
        if text_encoder is not None:
            raise ValueError(
                f"model.name={model.name} is conditioned on labels: set text_encoder.kind=none"
            )
    elif text_encoder is None:
        raise ValueError(
            f"model.name={model.name} is conditioned on text: set text_encoder.kind to t5, umt5 or "
            "hashed-words"
        )
    elif (model.caption_channels, model.max_caption_tokens) != (
        text_encoder.channels,
        text_encoder.max_tokens,
    ):
        raise ValueError(
            f"model.max_caption_tokens={model.max_caption_tokens} and model.caption_channels="
            f"{model.caption_channels}, but the {config.text_encoder.kind} text encoder gives "
            f"{text_encoder.max_tokens} tokens of {text_encoder.channels} channels: make them equal"
        )
    for bucket in config.data.buckets:
        video_encoder.latent_shape(bucket.num_frames, bucket.height, bucket.width)


# What may differ between a run and its resumption. Everything else would make it another run.
_MAY_CHANGE = (
    "name",
    "output",
    "train.steps",
    "train.accumulation",
    "train.log_every_steps",
    "train.init_from",
    "optimizer",
    "schedule",
    "validation",
    "sampling",
    "checkpoint",
    "metrics",
    "parallel",
    "data.root",
    "data.allow_outside_root",
    "data.num_workers",
    "data.prefetch_batches",
    "data.worker_timeout_seconds",
    "data.max_bad_fraction",
    "data.bad_grace",
    "video_encoder.frames_per_call",
    "video_encoder.path",
    "text_encoder.path",
    "text_encoder.tokenizer_path",
)


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """What differs, one `key: old → new` a line.

    Raises: ValueError if something differs that a resumed run must keep.
    """
    old, new = flatten(before), flatten(after)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    lines = {key: f"{key}: {old.get(key)} → {new.get(key)}" for key in keys}
    refused = [text for key, text in lines.items() if not _may_change(key)]
    if refused:
        raise ValueError(
            "this folder holds a run with another configuration; to resume it, keep\n  "
            + "\n  ".join(refused)
            + "\nor start anew with --fresh (the old folder is set aside) or another --name"
        )
    return list(lines.values())


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration as dotted keys; tuples of dataclasses by index."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        items = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    elif isinstance(config, tuple) and any(dataclasses.is_dataclass(item) for item in config):
        items = [(str(index), item) for index, item in enumerate(config)]
    else:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for name, value in items:
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in _MAY_CHANGE)
