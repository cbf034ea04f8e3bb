"""What a run is: the parts' own dataclasses, composed."""

from __future__ import annotations

from dataclasses import dataclass, field

from longtake.data import DataConfig
from longtake.diffusion import DiffusionConfig, SamplerConfig
from longtake.encoders import TextEncoderConfig, VideoEncoderConfig
from longtake.models import ModelConfig
from longtake.ops.kernels import KernelConfig
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
    encode_ahead: bool = False
    """Encode the next micro-batch on a second stream while this one is trained. It costs the
    encoders' memory beside the transformer's (`video_encoder.memory_gib`), and pays only where
    training leaves the GPU idle: a large step on one GPU does not (docs/encoders.md)."""
    condition_dropout: float = 0.1
    """Share of samples trained without their caption or label, for classifier-free guidance."""
    init_from: str | None = None
    """Public weights to start from (file or folder, see `longtake convert`); None draws new."""
    log_every_steps: int = 10

    def __post_init__(self) -> None:
        _check_least(self, "train", steps=1, accumulation=1, log_every_steps=1)
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

    def __post_init__(self) -> None:
        _check_least(
            self, "validation", every_steps=1, max_samples=1, batch_size=1, num_timesteps=1
        )


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

    def __post_init__(self) -> None:
        _check_least(self, "sampling", every_steps=0)
        if not 0 < self.frames_per_second <= 1000:
            raise ValueError(
                f"sampling.frames_per_second={self.frames_per_second} must be above 0 and at most "
                "1000"
            )


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
    kernels: KernelConfig = field(default_factory=KernelConfig)

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or not self.name.isprintable():
            raise ValueError(f"name={self.name!r} must be the name of a folder")
        if "/" in self.name:
            raise ValueError(f"name={self.name!r} must not be a path: put folders into output")

    @property
    def uses_random_encoders(self) -> bool:
        """Whether an encoder has random weights in place of pretrained ones: only a benchmark."""
        video, text = self.video_encoder, self.text_encoder
        return (video.kind == "diffusers" and video.weights == "random") or (
            text.kind in ("t5", "umt5") and text.weights == "random"
        )


def _check_least(config: object, place: str, **least: int) -> None:
    """Raises ValueError for a field of `config` that is below its least value."""
    for name, minimum in least.items():
        if getattr(config, name) < minimum:
            raise ValueError(f"{place}.{name}={getattr(config, name)} must be at least {minimum}")
