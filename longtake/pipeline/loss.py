"""One training loss: draw a timestep and noise for each sample, noise it, predict, compare."""

from __future__ import annotations

from torch import Tensor, nn

from longtake.diffusion import Objective
from longtake.pipeline.inputs import Inputs
from longtake.randomness import Stream, normal, uniform


def training_loss(
    model: nn.Module, objective: Objective, inputs: Inputs, *, condition_dropout: float
) -> Tensor:
    """Loss per sample, float32 (B,).

    Timestep, noise and condition dropout are functions of each sample's key, so the loss does not
    depend on how samples are spread over processes or micro-batches.
    """
    clean_BCTHW, keys = inputs.clean_BCTHW, inputs.keys
    height, width = inputs.pixel_size
    t_B = objective.draw_t(
        uniform(keys, Stream.TIMESTEP),
        num_frames=clean_BCTHW.shape[2],
        height=height,
        width=width,
    )
    noise_BCTHW = normal(keys, Stream.NOISE, tuple(clean_BCTHW.shape[1:]))
    drop_B = uniform(keys, Stream.CAPTION_DROPOUT) < condition_dropout

    def predict(noisy_BCTHW: Tensor, network_t_B: Tensor) -> Tensor:
        return model(noisy_BCTHW, network_t_B, **inputs.condition, drop_B=drop_B)

    return objective.loss(predict, clean_BCTHW, noise_BCTHW=noise_BCTHW, t_B=t_B)
