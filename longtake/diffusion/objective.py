"""What the training loop and the samplers ask of a diffusion objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# predict(noisy_BCTHW, network_t_B) -> the model's raw output, (B, C or 2C, T, H, W)
Predict = Callable[[Tensor, Tensor], Tensor]


class Objective(Protocol):
    """A way to noise latents and to score a model's prediction; training changes nothing in it.

    Nothing here waits for the device: times stay tensors from the draw to the loss.
    """

    learn_sigma: bool
    """Whether the model must output 2C channels (prediction, variance) instead of C."""

    def draw_t(self, uniform_B: Tensor, *, num_frames: int, height: int, width: int) -> Tensor:
        """Training times (B,) in the objective's own units, from uniform numbers in [0, 1).

        `num_frames` counts latent frames; `height` and `width` are pixels before the encoder.
        """
        ...

    def network_t(self, t_B: Tensor) -> Tensor:
        """What the model is told about the time: float32 (B,) in [0, 1000]."""
        ...

    def loss(
        self, predict: Predict, clean_BCTHW: Tensor, *, noise_BCTHW: Tensor, t_B: Tensor
    ) -> Tensor:
        """Loss per sample (B,), float32 or wider."""
        ...

    def grid_t(self, count: int, device: torch.device | str) -> Tensor:
        """`count` equidistant times, the centres of as many equal bins: for validation."""
        ...


def working_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or unchanged if wider: noise and losses are never computed in bf16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
