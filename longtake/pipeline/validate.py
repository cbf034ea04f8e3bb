"""Held-out loss on fixed samples, at fixed timesteps, with fixed noise: comparable along a run.

The training loss of a diffusion model is dominated by which timesteps a batch happened to draw;
this one moves only when the model does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longtake.diffusion import Objective
from longtake.pipeline.inputs import Inputs
from longtake.randomness import Stream, normal


@torch.no_grad()
def validation_loss(
    model: nn.Module, objective: Objective, held_out: Sequence[Inputs], *, num_timesteps: int
) -> Tensor:
    """Mean-loss sums per timestep, float32 (num_timesteps, 2): loss times weight, and weight.

    Sums, not means, so that the caller can add those of all processes before dividing.
    """
    device = held_out[0].clean_BCTHW.device
    grid = objective.grid_t(num_timesteps, device)
    sums = torch.zeros(num_timesteps, 2, device=device)
    for inputs in held_out:
        noise_BCTHW = normal(inputs.keys, Stream.NOISE, tuple(inputs.clean_BCTHW.shape[1:]))

        def predict(noisy_BCTHW: Tensor, network_t_B: Tensor, inputs: Inputs = inputs) -> Tensor:
            return model(noisy_BCTHW, network_t_B, **inputs.condition)

        for index in range(num_timesteps):
            t_B = grid[index].expand(len(noise_BCTHW))
            loss_B = objective.loss(predict, inputs.clean_BCTHW, noise_BCTHW=noise_BCTHW, t_B=t_B)
            sums[index, 0] += (loss_B * inputs.weights_B).sum()
            sums[index, 1] += inputs.weights_B.sum()
    return sums
