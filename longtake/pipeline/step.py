"""The training step: what `train` repeats and `bench` times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from longtake.diffusion import Objective
from longtake.parallel import sync_gradients
from longtake.pipeline.inputs import Inputs
from longtake.pipeline.loss import training_loss
from longtake.training import Ema, update_weights

# The step's parts, as a profile shows them.
FORWARD, BACKWARD, OPTIMIZER = "longtake.forward", "longtake.backward", "longtake.optimizer"


@dataclass(frozen=True)
class Trainee:
    """A model on its way: what a step reads and changes."""

    model: nn.Module
    objective: Objective
    optimizer: torch.optim.AdamW
    ema: Ema


@dataclass(frozen=True)
class StepResult:
    """What a step found, on the device: nobody has waited for it."""

    loss: Tensor  # this process's mean over its micro-batches, float64 ()
    gradient_norm: Tensor  # before clipping, of all processes, float32 ()
    applied: Tensor  # 1.0, or 0.0 if the gradients were not finite and the update was skipped


def training_step(
    trainee: Trainee,
    micro_batches: Iterable[Inputs],
    *,
    num_micro_batches: int,
    condition_dropout: float,
    clip_norm: float | None,
    lr: float,
    step: int,
) -> StepResult:
    """Forward and backward of every micro-batch, then one update of weights and averages.

    The micro-batches may be made while they are asked for. `step` counts from 0.
    """
    loss = torch.zeros((), dtype=torch.float64, device=next(trainee.model.parameters()).device)
    for number, inputs in enumerate(micro_batches, start=1):
        sync_gradients(trainee.model, is_last=number == num_micro_batches)
        with record_function(FORWARD):
            losses_B = training_loss(
                trainee.model, trainee.objective, inputs, condition_dropout=condition_dropout
            )
            weighted = losses_B.mean() / num_micro_batches
        with record_function(BACKWARD):
            weighted.backward()
        loss += weighted.detach()
        del losses_B, weighted  # and the graph's last nodes, before the next is made
    with record_function(OPTIMIZER):
        gradient_norm, applied = update_weights(
            trainee.model, trainee.optimizer, trainee.ema, clip_norm=clip_norm, lr=lr, step=step
        )
    return StepResult(loss=loss, gradient_norm=gradient_norm, applied=applied)
