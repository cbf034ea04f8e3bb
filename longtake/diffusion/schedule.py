"""Discrete noise levels of DDPM and everything derived from them, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, repeat

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise levels from nearly clean to nearly pure noise; every table is float64 (num_steps,).

    noisy[i] = signal[i] * clean + sigma[i] * noise, with signal² + sigma² = 1. The posterior of the
    next cleaner level, q(noisy[i-1] | noisy[i], clean), is Gaussian with

        mean = posterior_clean[i] * clean + posterior_noisy[i] * noisy[i]
        log variance = posterior_log_variance[i]

    where level -1 is the clean sample. The posterior variance of level 0 is zero; its logarithm is
    taken from level 1 instead.

    Source: Ho et al., arXiv:2006.11239, equations 4 to 7; Nichol and Dhariwal, arXiv:2102.09672.
    """

    timesteps: Tensor  # int64: what the network calls each level
    signal: Tensor
    sigma: Tensor
    log_beta: Tensor
    posterior_clean: Tensor
    posterior_noisy: Tensor
    posterior_log_variance: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    def respaced(self, count: int) -> NoiseSchedule:
        """The schedule of `count` of these levels, evenly spaced: fewer, larger steps.

        Raises ValueError if there are not that many levels.
        """
        kept = torch.tensor(spaced(count, len(self)))
        return schedule_of(self.signal[kept].square(), self.timesteps[kept])


def linear_schedule(
    num_steps: int = 1000, beta_first: float = 1e-4, beta_last: float = 0.02
) -> NoiseSchedule:
    """DDPM's schedule: the variance added by each step grows linearly."""
    betas = torch.linspace(beta_first, beta_last, num_steps, dtype=torch.float64)
    return schedule_of((1 - betas).cumprod(0), torch.arange(num_steps))


def schedule_of(signal_power: Tensor, timesteps: Tensor) -> NoiseSchedule:
    """The schedule whose levels keep these shares of the clean power (float64, falling)."""
    previous = torch.cat((signal_power.new_ones(1), signal_power[:-1]))
    betas = 1 - signal_power / previous
    noise_power = 1 - signal_power
    variance = betas * (1 - previous) / noise_power
    # The clean sample is certain at level 0: log 0 is replaced, as in the original implementation.
    variance[0] = variance[min(1, len(variance) - 1)]
    return NoiseSchedule(
        timesteps=timesteps,
        signal=signal_power.sqrt(),
        sigma=noise_power.sqrt(),
        log_beta=betas.log(),
        posterior_clean=betas * previous.sqrt() / noise_power,
        posterior_noisy=(1 - previous) * (1 - betas).sqrt() / noise_power,
        posterior_log_variance=variance.log(),
    )


def spaced(count: int, num_steps: int) -> list[int]:
    """`count` of the indices 0 .. num_steps - 1, evenly spaced, the first and the last included.

    A single one is the last: sampling starts from noise.

    Raises ValueError if count is not in [1, num_steps].
    """
    if not 1 <= count <= num_steps:
        raise ValueError(f"steps={count} must be between 1 and the {num_steps} steps of training")
    if count == 1:
        return [num_steps - 1]
    # Summed, not multiplied: the rounding of halves then agrees with the original implementation's.
    stride = (num_steps - 1) / (count - 1)
    return [round(index) for index in accumulate(repeat(stride, count - 1), initial=0.0)]
