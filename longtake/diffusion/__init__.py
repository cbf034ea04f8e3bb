"""The mathematics of diffusion: objectives to train with and samplers to draw with."""

from longtake.diffusion.build import Sampler, build_objective, build_sampler
from longtake.diffusion.config import DiffusionConfig, SamplerConfig
from longtake.diffusion.flow import RectifiedFlow
from longtake.diffusion.guidance import guided
from longtake.diffusion.iddpm import IDDPM
from longtake.diffusion.objective import Objective, Predict

__all__ = [
    "IDDPM",
    "DiffusionConfig",
    "Objective",
    "Predict",
    "RectifiedFlow",
    "Sampler",
    "SamplerConfig",
    "build_objective",
    "build_sampler",
    "guided",
]
