"""One update of weights, moments and averages from the gradients of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from longtake.ops.adamw_ema import adamw_ema, squared_norm
from longtake.ops.kernels import elementwise
from longtake.ops.tensor_table import TensorTable
from longtake.parallel import gathered_copies, local_parts, sum_over_shards
from longtake.training.ema import Ema, decay_at, move_averages
from longtake.training.optimizer import apply_update, clip_factor, clip_gradients


@dataclass(frozen=True)
class _Tables:
    gradients: TensorTable = field(default_factory=TensorTable)
    weights: TensorTable = field(default_factory=TensorTable)


# What the kernels of a run keep on the device between steps; it goes when its optimizer does.
_tables: WeakKeyDictionary[torch.optim.Optimizer, _Tables] = WeakKeyDictionary()


@torch.no_grad()
def update_weights(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    ema: Ema,
    *,
    clip_norm: float | None,
    lr: float,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Clips the gradients, takes a step of AdamW at this learning rate, moves the averages towards
    the new weights, and drops the gradients. `step` counts updates from 0.

    Returns the gradient norm before clipping, over all processes, fp32 (), and 1.0 () if the update
    was applied. A norm that is not finite skips it, on all processes alike: weights, moments and
    averages keep every bit. All is decided on the device; the host does not wait.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if elementwise(next(model.parameters())) == "triton":
        return _in_one_pass(model, optimizer, ema, clip_norm=clip_norm, step=step)
    norm = clip_gradients(model, clip_norm)
    applied = apply_update(optimizer, norm, lr=lr)
    ema.update(step, applied)
    return norm, applied


def _in_one_pass(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    ema: Ema,
    *,
    clip_norm: float | None,
    step: int,
) -> tuple[Tensor, Tensor]:
    tables = _tables.setdefault(optimizer, _Tables())
    (group,) = optimizer.param_groups
    held = [one for one in ema.pairs() if one.param.grad is not None]
    assert held, "update_weights found no gradient: call it after backward"
    copies = gathered_copies(model, {one.name: one.param for one in held})
    states = [optimizer.state[one.param] for one in held]
    # Asked for anew at every step: gradients have new memory, and FSDP may move a parameter's.
    gradients = local_parts([one.param.grad for one in held if one.param.grad is not None])

    squared = squared_norm(gradients, tables.gradients)
    norm = sum_over_shards(squared, held[0].param).sqrt()
    applied = torch.isfinite(norm).float()
    rate = 1 - decay_at(step, ema.config)
    adamw_ema(
        local_parts([one.param for one in held]),
        gradients,
        local_parts([state["exp_avg"] for state in states]),
        local_parts([state["exp_avg_sq"] for state in states]),
        local_parts([one.average for one in held]),
        [state["step"] for state in states],
        clip_factor=clip_factor(norm, clip_norm),
        applied=applied,
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        ema_rate=rate,
        copies=copies,
        table=tables.weights,
    )
    if others := [one for one in ema.pairs() if one.param.grad is None]:
        move_averages(others, rate, applied)
    optimizer.zero_grad(set_to_none=True)
    return norm, applied
