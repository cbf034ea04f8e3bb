"""From configuration to an objective and a sampler; the only place that knows which go together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from longtake.diffusion import samplers
from longtake.diffusion.config import DiffusionConfig, SamplerConfig
from longtake.diffusion.flow import RectifiedFlow
from longtake.diffusion.iddpm import IDDPM
from longtake.diffusion.objective import Objective, Predict
from longtake.diffusion.samplers import StepNoise

# draw(predict, noise_BCTHW, step_noise) -> latents_BCTHW
Sampler = Callable[[Predict, Tensor, StepNoise], Tensor]


def build_objective(config: DiffusionConfig) -> Objective:
    """The training objective that the configuration names.

    Raises ValueError for settings that are out of range or that the objective would ignore.
    """
    if config.objective == "iddpm":
        defaults = DiffusionConfig()
        for name in ("timesteps", "logit_mean", "logit_std", "shift", "shift_by_resolution"):
            value = getattr(config, name)
            if value != getattr(defaults, name):
                raise ValueError(
                    f"{name}={value} has no effect with objective=iddpm: leave it out, or use "
                    "objective=flow"
                )
        return IDDPM()
    if config.shift <= 0:
        raise ValueError(f"shift={config.shift} must be positive; 1 leaves the times as they are")
    if config.logit_std <= 0:
        raise ValueError(f"logit_std={config.logit_std} must be positive")
    return RectifiedFlow(
        timesteps=config.timesteps,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
        shift=config.shift,
        shift_by_resolution=config.shift_by_resolution,
    )


def build_sampler(
    config: SamplerConfig, objective: Objective, *, num_frames: int, height: int, width: int
) -> Sampler:
    """A function from noise to latents, for samples of so many latent frames and pixels.

    Raises ValueError if the sampler does not go with the objective or the number of steps is out of
    range.
    """
    if config.steps < 1:
        raise ValueError(f"steps={config.steps} must be at least 1")
    if isinstance(objective, IDDPM):
        return _iddpm_sampler(config, objective)
    if isinstance(objective, RectifiedFlow):
        shift = objective.shift_of(num_frames, height, width)
        return _flow_sampler(config, shift)
    raise TypeError(f"no sampler is known for the objective {type(objective).__name__}")


def _iddpm_sampler(config: SamplerConfig, objective: IDDPM) -> Sampler:
    schedule = objective.schedule
    match config.name:
        case "ddpm":
            return partial(samplers.sample_ddpm, schedule=schedule.respaced(config.steps))
        case "ddim":
            return partial(samplers.sample_ddim, schedule=schedule.respaced(config.steps))
        case "dpm-solver++":
            return partial(
                samplers.sample_dpm_solver,
                levels=samplers.iddpm_levels(schedule, config.steps),
                clean_of=samplers.iddpm_clean_of,
            )
        case _:
            raise ValueError(
                f"sampler={config.name} does not go with objective=iddpm: use ddpm, ddim or "
                "dpm-solver++"
            )


def _flow_sampler(config: SamplerConfig, shift: float) -> Sampler:
    levels = samplers.flow_levels(config.steps, shift=shift)
    match config.name:
        case "euler":
            return partial(samplers.sample_euler, levels=levels)
        case "dpm-solver++":
            return partial(
                samplers.sample_dpm_solver, levels=levels, clean_of=samplers.flow_clean_of
            )
        case _:
            raise ValueError(
                f"sampler={config.name} does not go with objective=flow: use euler or dpm-solver++"
            )
