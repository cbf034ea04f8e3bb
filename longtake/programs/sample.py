"""Sample: a run's checkpoint to videos or images on disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from longtake.config import RunConfig, load_yaml, verify_kernels, with_encoder_weights
from longtake.diffusion import SamplerConfig, build_objective
from longtake.encoders import build_text_encoder, build_video_encoder
from longtake.models import build_model_from_config
from longtake.ops.kernels import use_kernels
from longtake.pipeline import Request, generate, write_clips
from longtake.training import find_checkpoint, load_weights_for_inference

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Generate videos (mp4) or, with one frame, images (PNG) from a run's checkpoint."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its newest checkpoint is taken) or one checkpoint inside it."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to show; give it several times for several videos. Default: the run's own prompts."""
    label: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """Class to show, for a model conditioned on labels; may be given several times."""
    seed: int | None = None
    """Video number i depends on the seed, i and its prompt alone. Default: the run's."""
    sampler: Literal["ddpm", "ddim", "dpm-solver++", "euler"] | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    """1 turns guidance off."""
    num_frames: int | None = None
    """Default: those of the run's first bucket, like height and width."""
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    """Playing speed of the files."""
    out: Path | None = None
    """Folder for the files. Default: samples/from-step-N in the run's folder."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged weights, or those of the last step."""
    encoder_weights: Literal["pretrained", "random"] | None = None
    """Needed again as `random` for a run trained with random encoders: its samples mean nothing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"--fps {self.fps} must be above 0 and at most 1000")


def main(arguments: Sequence[str]) -> int:
    """`longtake sample`."""
    command = tyro.cli(SampleCommand, prog="longtake sample", args=list(arguments))
    for path in sample(command):
        print(path)
    return 0


def sample(command: SampleCommand) -> list[Path]:
    """Generate what the command asks for; returns the files written."""
    checkpoint = find_checkpoint(command.run)
    config = load_yaml(checkpoint / "config.yaml", RunConfig)
    if config.uses_random_encoders and command.encoder_weights != "random":
        raise ValueError(
            f"{command.run} was trained with random encoder weights, so its samples mean nothing; "
            "to sample it all the same, for a test or a benchmark, add --encoder-weights random"
        )
    if command.encoder_weights:
        config = with_encoder_weights(config, command.encoder_weights)
    device = _device(command.device)
    request = _request(command, config)

    video_encoder = build_video_encoder(config.video_encoder, device, config.seed)
    text_encoder = build_text_encoder(config.text_encoder, device, config.seed)
    objective = build_objective(config.diffusion)
    with torch.device("meta"):
        model = build_model_from_config(config.model)
    model.to_empty(device=device)
    extra = load_weights_for_inference(checkpoint, model, ema=command.weights == "ema")
    if device.type == "cuda":
        if config.parallel.param_dtype != "fp32":
            model.to(torch.bfloat16)
        use_kernels(config.kernels)
        _, *latents = video_encoder.latent_shape(request.num_frames, request.height, request.width)
        for failure in verify_kernels(config, [(latents[0], latents[1], latents[2])], device):
            log.warning("a kernel failed its check on this device: %s", failure)
    model.eval()

    videos = generate(
        model,
        objective,
        request,
        _sampler(command, config.sampling.sampler),
        video_encoder=video_encoder,
        text_encoder=text_encoder,
        device=device,
        with_sizes=config.model.micro_conditioning,
    )
    folder = command.out or checkpoint.parent.parent / "samples" / f"from-step-{extra['step']:08}"
    fps = command.fps or config.sampling.frames_per_second
    return write_clips(
        folder,
        videos,
        request.captions,
        fps=fps,
        with_random_encoders=config.uses_random_encoders,
    )


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no CUDA device: see `longtake doctor`")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _request(command: SampleCommand, config: RunConfig) -> Request:
    """What to generate, the run's own settings filling in what the command leaves open."""
    is_labelled = config.text_encoder.kind == "none"
    if is_labelled and command.prompt:
        raise ValueError("this model is conditioned on labels: use --label instead of --prompt")
    if not is_labelled and command.label:
        raise ValueError("this model is conditioned on text: use --prompt instead of --label")
    if bad := [label for label in command.label if not 0 <= label < config.model.num_classes]:
        raise ValueError(f"--label {bad[0]} must be from 0 to {config.model.num_classes - 1}")
    prompts = () if is_labelled else command.prompt or config.sampling.prompts
    labels = (command.label or config.sampling.labels) if is_labelled else ()
    if not prompts and not labels:
        raise ValueError(f"nothing to sample: give {'--label' if is_labelled else '--prompt'}")
    bucket = config.data.buckets[0]
    return Request(
        prompts=prompts,
        labels=labels,
        num_frames=bucket.num_frames if command.num_frames is None else command.num_frames,
        height=bucket.height if command.height is None else command.height,
        width=bucket.width if command.width is None else command.width,
        seed=config.sampling.seed if command.seed is None else command.seed,
    )


def _sampler(command: SampleCommand, default: SamplerConfig) -> SamplerConfig:
    chosen = {
        "name": command.sampler,
        "steps": command.steps,
        "guidance_scale": command.guidance_scale,
    }
    return replace(default, **{key: value for key, value in chosen.items() if value is not None})
