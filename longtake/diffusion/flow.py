"""Rectified flow: samples move in a straight line from clean (t = 0) to noise (t = 1).

Shape letters: B batch, C channels, T frames, H W height and width.

Source: Liu et al., arXiv:2209.03003; Esser et al., arXiv:2403.03206 (timesteps and shift).
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
from torch import Tensor

from longtake.diffusion.objective import Predict, working_precision

NETWORK_UNITS = 1000.0  # the timestep embedding was designed for DDPM's step numbers
_UNSHIFTED_PIXELS = 512 * 512

Time = TypeVar("Time", Tensor, float)


class RectifiedFlow:
    """Velocity prediction in continuous time. t is float32 in [0, 1]."""

    learn_sigma = False

    def __init__(
        self,
        *,
        timesteps: Literal["uniform", "logit-normal"] = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        shift: float = 1.0,
        shift_by_resolution: bool = False,
    ) -> None:
        self.timesteps = timesteps
        self.logit_mean = logit_mean
        self.logit_std = logit_std
        self.shift = shift
        self.shift_by_resolution = shift_by_resolution

    def draw_t(self, uniform_B: Tensor, *, num_frames: int, height: int, width: int) -> Tensor:
        """Times of the configured distribution, then shifted as samples of this size need."""
        t_B = uniform_B
        if self.timesteps == "logit-normal":
            t_B = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(uniform_B))
        return shift_time(t_B, self.shift_of(num_frames, height, width))

    def shift_of(self, num_frames: int, height: int, width: int) -> float:
        """The shift for a sample of so many latent frames and pixels.

        Neighbouring pixels and frames repeat each other, so a larger sample needs more noise to be
        hidden as much. Source: Esser et al., section 5.3.2, for pixels; Open-Sora 1.2 for frames.
        """
        if not self.shift_by_resolution:
            return self.shift
        return self.shift * math.sqrt(height * width / _UNSHIFTED_PIXELS) * math.sqrt(num_frames)

    def network_t(self, t_B: Tensor) -> Tensor:
        """1000 t, float32."""
        return t_B.float() * NETWORK_UNITS

    def grid_t(self, count: int, device: torch.device | str) -> Tensor:
        """`count` equidistant times, float32, not shifted."""
        return (torch.arange(count, device=device, dtype=torch.float32) + 0.5) / count

    def loss(
        self, predict: Predict, clean_BCTHW: Tensor, *, noise_BCTHW: Tensor, t_B: Tensor
    ) -> Tensor:
        """Mean squared velocity error per sample, (B,): velocity = noise - clean."""
        clean_BCTHW = working_precision(clean_BCTHW)
        noise_BCTHW = noise_BCTHW.to(clean_BCTHW.dtype)
        t_B1111 = t_B.to(clean_BCTHW.dtype).view(-1, 1, 1, 1, 1)
        noisy_BCTHW = (1 - t_B1111) * clean_BCTHW + t_B1111 * noise_BCTHW
        velocity_BCTHW = predict(noisy_BCTHW, self.network_t(t_B)).to(noisy_BCTHW.dtype)
        check_velocity(velocity_BCTHW, noisy_BCTHW)
        error_BCTHW = velocity_BCTHW - (noise_BCTHW - clean_BCTHW)
        return error_BCTHW.square().flatten(1).mean(dim=1)


def shift_time(t: Time, shift: float) -> Time:
    """t' = shift * t / (1 + (shift - 1) * t): multiplies the noise-to-signal ratio by `shift`."""
    # Written so that 1 stays exactly 1 in floating point.
    return shift * t / (shift * t + (1 - t))


def check_velocity(output: Tensor, noisy_BCTHW: Tensor) -> None:
    """Raise ValueError unless a model's output has the shape of what it was given."""
    if output.shape != noisy_BCTHW.shape:
        raise ValueError(
            f"objective=flow needs a model output of shape {tuple(noisy_BCTHW.shape)} (velocity), "
            f"got {tuple(output.shape)}: build the model with learn_sigma=False"
        )
