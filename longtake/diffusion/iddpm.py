"""Improved DDPM: the model predicts the noise and, beside it, the variance of each denoising step.

Shape letters: B batch, C channels, T frames, H W height and width.

Source: Nichol and Dhariwal, arXiv:2102.09672; used by DiT (arXiv:2212.09748) and Open-Sora 1.0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longtake.diffusion.gaussians import discretized_log_likelihood, kl_divergence
from longtake.diffusion.objective import Predict, working_precision
from longtake.diffusion.schedule import NoiseSchedule, linear_schedule


class IDDPM:
    """Noise prediction over 1000 discrete steps with a learned variance. t is int64 in [0, 999]."""

    learn_sigma = True

    def __init__(self, schedule: NoiseSchedule | None = None) -> None:
        self.schedule = schedule or linear_schedule()
        self._tables = torch.stack(
            (
                self.schedule.signal,
                self.schedule.sigma,
                self.schedule.log_beta,
                self.schedule.posterior_clean,
                self.schedule.posterior_noisy,
                self.schedule.posterior_log_variance,
            )
        )
        self._placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def draw_t(self, uniform_B: Tensor, *, num_frames: int, height: int, width: int) -> Tensor:
        """Uniform over the steps, whatever the size of the sample."""
        return (uniform_B * len(self.schedule)).long()

    def network_t(self, t_B: Tensor) -> Tensor:
        """The step's number, float32."""
        return t_B.float()

    def grid_t(self, count: int, device: torch.device | str) -> Tensor:
        """`count` equidistant steps, int64."""
        return (2 * torch.arange(count, device=device) + 1) * len(self.schedule) // (2 * count)

    def loss(
        self, predict: Predict, clean_BCTHW: Tensor, *, noise_BCTHW: Tensor, t_B: Tensor
    ) -> Tensor:
        """Mean squared noise error plus the variational bound in bits per value, (B,).

        The bound's gradient reaches the variance only: the predicted noise enters it detached. The
        two terms are added unweighted (the lineage's "MSE" loss type).
        """
        clean_BCTHW = working_precision(clean_BCTHW)
        noise_BCTHW = noise_BCTHW.to(clean_BCTHW.dtype)
        signal, sigma, log_beta, posterior_clean, posterior_noisy, posterior_log_variance = (
            self._tables_like(clean_BCTHW)[:, t_B].view(6, -1, 1, 1, 1, 1).unbind()
        )
        noisy_BCTHW = signal * clean_BCTHW + sigma * noise_BCTHW
        output = predict(noisy_BCTHW, self.network_t(t_B)).to(noisy_BCTHW.dtype)
        predicted_BCTHW, variance_BCTHW = split_prediction(output, noisy_BCTHW)
        squared_B = _mean_per_sample((predicted_BCTHW - noise_BCTHW).square())

        # The true and the predicted posterior share the coefficient of noisy, so only what they
        # believe to be clean differs.
        believed_BCTHW = (noisy_BCTHW - sigma * predicted_BCTHW.detach()) / signal
        true_mean = posterior_clean * clean_BCTHW + posterior_noisy * noisy_BCTHW
        mean = posterior_clean * believed_BCTHW + posterior_noisy * noisy_BCTHW
        log_variance = interpolate_log_variance(variance_BCTHW, posterior_log_variance, log_beta)
        divergence_B = _mean_per_sample(
            kl_divergence(true_mean, posterior_log_variance, mean, log_variance)
        )
        likelihood_B = _mean_per_sample(discretized_log_likelihood(clean_BCTHW, mean, log_variance))
        bound_B = torch.where(t_B == 0, -likelihood_B, divergence_B) / math.log(2)
        return squared_B + bound_B

    def _tables_like(self, tensor: Tensor) -> Tensor:
        """The schedule's tables (6, num_steps) in the tensor's dtype on its device; moved once."""
        place = tensor.device, tensor.dtype
        if place not in self._placed:
            # Made under inference mode they could never take part in training.
            with torch.inference_mode(False):
                self._placed[place] = self._tables.to(*place)
        return self._placed[place]


def interpolate_log_variance(
    variance_BCTHW: Tensor, smallest: Tensor | float, largest: Tensor | float
) -> Tensor:
    """Log variance from the model's variance output: -1 is the smallest, 1 the largest."""
    fraction_BCTHW = (variance_BCTHW + 1) / 2
    return fraction_BCTHW * largest + (1 - fraction_BCTHW) * smallest


def split_prediction(output: Tensor, noisy_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted noise and variance, both (B, C, T, H, W), from a model output of 2C channels.

    Raises ValueError for any other shape.
    """
    channels = noisy_BCTHW.shape[1]
    expected = (len(noisy_BCTHW), 2 * channels, *noisy_BCTHW.shape[2:])
    if output.shape != expected:
        raise ValueError(
            f"objective=iddpm needs a model output of shape {expected} (noise and variance), got "
            f"{tuple(output.shape)}: build the model with learn_sigma=True"
        )
    return output[:, :channels], output[:, channels:]


def _mean_per_sample(values_BCTHW: Tensor) -> Tensor:
    return values_BCTHW.flatten(1).mean(dim=1)
