"""Classifier-free guidance: push the prediction away from the one made without the condition.

Shape letters: B batch, C channels, T frames, H W height and width.

Source: Ho and Salimans, arXiv:2207.12598.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from longtake.diffusion.objective import Predict, working_precision


def guided(
    model: Callable[..., Tensor],
    condition: Mapping[str, Tensor],
    *,
    guidance_scale: float,
    latent_channels: int,
    channels: int | None = None,
) -> Predict:
    """A `predict(noisy_BCTHW, network_t_B)` that runs the model with and without its condition.

        prediction = without + guidance_scale * (with - without)

    Both halves run as one batch of 2B, told apart by the model's `drop_B`. Only the first
    `channels` of the `latent_channels` are guided (None: all); the others, and a learned variance,
    are the conditional half's. DiT's and Open-Sora 1.0's samples were made with 3 channels of 4.

    Raises ValueError if `channels` is not in [1, latent_channels].
    """
    num_guided = latent_channels if channels is None else channels
    if not 1 <= num_guided <= latent_channels:
        raise ValueError(
            f"guidance_channels={channels} must be between 1 and the {latent_channels} channels of "
            "the latents; leave it out to guide them all"
        )
    if guidance_scale == 1:
        return lambda noisy_BCTHW, network_t_B: model(noisy_BCTHW, network_t_B, **condition)

    doubled_condition = {name: torch.cat((value, value)) for name, value in condition.items()}

    def predict(noisy_BCTHW: Tensor, network_t_B: Tensor) -> Tensor:
        size = len(noisy_BCTHW)
        output = model(
            torch.cat((noisy_BCTHW, noisy_BCTHW)),
            torch.cat((network_t_B, network_t_B)),
            **doubled_condition,
            drop_B=torch.arange(2 * size, device=noisy_BCTHW.device) >= size,
        )
        with_condition, without = working_precision(output).chunk(2)
        guided_BCTHW = torch.lerp(
            without[:, :num_guided], with_condition[:, :num_guided], guidance_scale
        )
        return torch.cat((guided_BCTHW, with_condition[:, num_guided:]), dim=1)

    return predict
