"""From noise to samples: DDPM, DDIM, DPM-Solver++ (2M) and Euler, each a loop over noise levels.

All take `predict(noisy_BCTHW, network_t_B)`, the initial noise and `step_noise(i)`, the fresh noise
of step i, and return latents of the noise's shape: a function of these alone. Coefficients are
Python floats (64-bit); tensors are float32, or float64 if the noise is.

Shape letters: B batch, C channels, T frames, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longtake.diffusion.flow import NETWORK_UNITS, check_velocity, shift_time
from longtake.diffusion.iddpm import interpolate_log_variance, split_prediction
from longtake.diffusion.objective import Predict, working_precision
from longtake.diffusion.schedule import NoiseSchedule, spaced

StepNoise = Callable[[int], Tensor]


@dataclass(frozen=True)
class Level:
    """One noise level: noisy = signal * clean + sigma * noise."""

    signal: float
    sigma: float
    network_t: float

    @property
    def log_snr(self) -> float:
        """Half the logarithm of the signal-to-noise ratio, infinite at the two ends."""
        if self.sigma == 0:
            return math.inf
        return -math.inf if self.signal == 0 else math.log(self.signal / self.sigma)


CLEAN = Level(signal=1.0, sigma=0.0, network_t=0.0)


def sample_ddpm(
    predict: Predict, noise_BCTHW: Tensor, step_noise: StepNoise, *, schedule: NoiseSchedule
) -> Tensor:
    """Ancestral sampling with the learned variance: one draw from the model's posterior per level.

    Source: Ho et al., arXiv:2006.11239, algorithm 2; Nichol and Dhariwal, arXiv:2102.09672.
    """
    noisy_BCTHW = working_precision(noise_BCTHW)
    for step, index in enumerate(reversed(range(len(schedule)))):
        level = schedule_level(schedule, index)
        predicted_BCTHW, variance_BCTHW = split_prediction(
            _predict_at(predict, noisy_BCTHW, level), noisy_BCTHW
        )
        clean_BCTHW = (noisy_BCTHW - level.sigma * predicted_BCTHW) / level.signal
        posterior_clean = schedule.posterior_clean[index].item()
        posterior_noisy = schedule.posterior_noisy[index].item()
        noisy_BCTHW = posterior_clean * clean_BCTHW + posterior_noisy * noisy_BCTHW
        if index > 0:
            log_variance_BCTHW = interpolate_log_variance(
                variance_BCTHW,
                schedule.posterior_log_variance[index].item(),
                schedule.log_beta[index].item(),
            )
            fresh_BCTHW = step_noise(step).to(noisy_BCTHW.dtype)
            noisy_BCTHW = noisy_BCTHW + (0.5 * log_variance_BCTHW).exp() * fresh_BCTHW
    return noisy_BCTHW


def sample_ddim(
    predict: Predict, noise_BCTHW: Tensor, step_noise: StepNoise, *, schedule: NoiseSchedule
) -> Tensor:
    """Deterministic DDIM (eta = 0): denoise completely, then noise again to the next level.

    Source: Song et al., arXiv:2010.02502, equation 12.
    """
    noisy_BCTHW = working_precision(noise_BCTHW)
    for index in reversed(range(len(schedule))):
        level = schedule_level(schedule, index)
        target = schedule_level(schedule, index - 1) if index > 0 else CLEAN
        predicted_BCTHW, _ = split_prediction(_predict_at(predict, noisy_BCTHW, level), noisy_BCTHW)
        clean_BCTHW = (noisy_BCTHW - level.sigma * predicted_BCTHW) / level.signal
        noisy_BCTHW = target.signal * clean_BCTHW + target.sigma * predicted_BCTHW
    return noisy_BCTHW


def sample_dpm_solver(
    predict: Predict,
    noise_BCTHW: Tensor,
    step_noise: StepNoise,
    *,
    levels: list[Level],
    clean_of: Callable[[Tensor, Tensor, Level], Tensor],
) -> Tensor:
    """DPM-Solver++ (2M): each step extrapolates the clean prediction linearly in log_snr.

    With h the growth of log_snr over this step, h_before that of the step before, `clean` the
    newest prediction and `clean_before` the one before it:

        ahead = clean + h / (2 h_before) * (clean - clean_before)
        noisy = sigma_next / sigma * noisy + signal_next * (1 - exp(-h)) * ahead

    The first step has no history, and the last does not extrapolate: it is the largest in log_snr,
    and infinite for a flow. `clean_of(output, noisy_BCTHW, level)` turns the model's output into a
    clean prediction.

    Source: Lu et al., arXiv:2211.01095, algorithm 2.
    """
    noisy_BCTHW = working_precision(noise_BCTHW)
    clean_before, growth_before = None, 0.0
    num_steps = len(levels) - 1
    for step in range(num_steps):
        level, target = levels[step], levels[step + 1]
        output = _predict_at(predict, noisy_BCTHW, level)
        clean_BCTHW = clean_of(output, noisy_BCTHW, level)
        growth = target.log_snr - level.log_snr
        ahead_BCTHW = clean_BCTHW
        if clean_before is not None and step < num_steps - 1:
            ahead_BCTHW = torch.lerp(clean_before, clean_BCTHW, 1 + growth / (2 * growth_before))
        noisy_BCTHW = (
            target.sigma / level.sigma * noisy_BCTHW
            - target.signal * math.expm1(-growth) * ahead_BCTHW
        )
        clean_before, growth_before = clean_BCTHW, growth
    return noisy_BCTHW


def sample_euler(
    predict: Predict, noise_BCTHW: Tensor, step_noise: StepNoise, *, levels: list[Level]
) -> Tensor:
    """Euler steps along the predicted velocity, from t = 1 to t = 0."""
    noisy_BCTHW = working_precision(noise_BCTHW)
    for level, target in pairwise(levels):
        velocity_BCTHW = _predict_at(predict, noisy_BCTHW, level)
        check_velocity(velocity_BCTHW, noisy_BCTHW)
        noisy_BCTHW = noisy_BCTHW + (target.sigma - level.sigma) * velocity_BCTHW
    return noisy_BCTHW


def flow_levels(steps: int, *, shift: float) -> list[Level]:
    """`steps` + 1 levels from t = 1 to t = 0, equidistant before the shift that training used."""
    times = [shift_time(1 - step / steps, shift) for step in range(steps + 1)]
    return [Level(signal=1 - t, sigma=t, network_t=NETWORK_UNITS * t) for t in times]


def flow_clean_of(output: Tensor, noisy_BCTHW: Tensor, level: Level) -> Tensor:
    """The clean prediction that a velocity implies."""
    check_velocity(output, noisy_BCTHW)
    return noisy_BCTHW - level.sigma * output


def iddpm_levels(schedule: NoiseSchedule, steps: int) -> list[Level]:
    """`steps` + 1 levels, equidistant in time, from the schedule's last to its first.

    The first has 1 % noise, which stays in the sample, as with the original solver.
    """
    if steps >= len(schedule):
        raise ValueError(f"steps={steps} must be below the {len(schedule)} steps of training")
    return [schedule_level(schedule, index) for index in reversed(spaced(steps + 1, len(schedule)))]


def iddpm_clean_of(output: Tensor, noisy_BCTHW: Tensor, level: Level) -> Tensor:
    """The clean prediction that a noise prediction implies; the variance is not used."""
    predicted_BCTHW, _ = split_prediction(output, noisy_BCTHW)
    return (noisy_BCTHW - level.sigma * predicted_BCTHW) / level.signal


def schedule_level(schedule: NoiseSchedule, index: int) -> Level:
    """Level `index` of a discrete schedule."""
    return Level(
        signal=schedule.signal[index].item(),
        sigma=schedule.sigma[index].item(),
        network_t=float(schedule.timesteps[index].item()),
    )


def _predict_at(predict: Predict, noisy_BCTHW: Tensor, level: Level) -> Tensor:
    """The model's raw output in the precision of the sampler."""
    network_t_B = torch.full(
        (len(noisy_BCTHW),), level.network_t, dtype=torch.float32, device=noisy_BCTHW.device
    )
    return predict(noisy_BCTHW, network_t_B).to(noisy_BCTHW.dtype)
