"""What noise a model learns to remove, and how samples are drawn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The training objective.

    `iddpm`: noise prediction over 1000 discrete steps, with a learned variance (DiT, PixArt,
    Open-Sora 1.0). `flow`: velocity prediction in continuous time (Open-Sora 1.2 and most since).
    """

    objective: Literal["iddpm", "flow"] = "iddpm"
    timesteps: Literal["uniform", "logit-normal"] = "uniform"
    """How training times are distributed, before the shift; `logit-normal` is for flow only."""
    logit_mean: float = 0.0
    """Of the logit of t; positive favours noise."""
    logit_std: float = 1.0
    shift: float = 1.0
    """Flow: time shift t' = shift * t / (1 + (shift - 1) * t); above 1 favours noise."""
    shift_by_resolution: bool = False
    """Flow: multiply the shift by sqrt(pixels / 512²) * sqrt(latent frames)."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How noise becomes a sample. `ddpm` and `ddim` need `iddpm`, `euler` needs `flow`."""

    name: Literal["ddpm", "ddim", "dpm-solver++", "euler"] = "dpm-solver++"
    steps: int = 20
    """Model evaluations (each of twice the batch when guided)."""
    guidance_scale: float = 7.0
    """Classifier-free guidance; 1 turns it off and halves the cost."""
    guidance_channels: int | None = None
    """Guide only the first so many latent channels; 3 is how DiT and Open-Sora 1.0 sampled."""
