"""AdamW whose every decision is made on the device: clipping, and skipping an update that is not
finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtake.parallel import drop_gathered, global_norm, local_parts

_multiply_all = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the clipping before it. The learning rate is the peak that the schedule scales."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None leaves gradients as they are."""
    max_skipped_in_a_row: int = 10
    """Updates skipped because of a non-finite gradient before the run stops; 0 never stops."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "max_skipped_in_a_row"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={self.betas} must be in [0, 1)")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(
                f"optimizer.clip_norm={self.clip_norm} must be above 0, or None to clip nothing"
            )


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over all parameters, with its moments allocated now.

    Moments that exist from the start make the first checkpoint complete and the memory known before
    step 1. The model must be on its final device and sharded.
    """
    drop_gathered(model)  # what it shows otherwise are copies
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    for param in model.parameters():
        assert not param.is_meta, "build the optimizer after materialize: its moments need memory"
        # What AdamW itself would make at its first step.
        optimizer.state[param] = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(param, requires_grad=False),
        }
    return optimizer


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scales all gradients so that their global norm is at most `max_norm`; returns the norm
    before, (), fp32.

    The norm is that of the whole model over all processes and stays on the device. It is not finite
    exactly if a gradient of any process is not (or their squares overflow).
    """
    drop_gathered(model)  # a lone shard shows its gathered weights, whose gradients are elsewhere
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    assert gradients, "clip_gradients found no gradient: call it after backward"
    norm = global_norm(gradients)
    if max_norm is not None:
        _multiply_all(local_parts(gradients), clip_factor(norm, max_norm))
    return norm


def clip_factor(norm: Tensor, max_norm: float | None) -> Tensor:
    """What brings gradients of this norm to at most `max_norm`, (), fp32; 1 if that is None."""
    if max_norm is None:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def apply_update(optimizer: torch.optim.AdamW, gradient_norm: Tensor, *, lr: float) -> Tensor:
    """One step at this learning rate, then drops the gradients; returns 1.0 if it was applied, 0.0
    if skipped.

    A gradient norm that is not finite skips the step: weights and moments keep every bit. The fused
    kernel looks at the flag on the device, so the host does not wait; and since the norm is that of
    all processes, all of them skip together.
    """
    applied = torch.isfinite(gradient_norm).float()
    # What the fused kernel reads, made for gradient scaling.
    optimizer.found_inf = 1 - applied  # pyright: ignore[reportAttributeAccessIssue]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return applied


class SkippedUpdates:
    """Counts skipped updates on the device; reading a count makes the host wait, so do it at log
    steps."""

    def __init__(self, device: torch.device, *, total: int = 0, in_a_row: int = 0) -> None:
        self.total = torch.tensor(total, dtype=torch.int64, device=device)
        self.in_a_row = torch.tensor(in_a_row, dtype=torch.int64, device=device)

    def add(self, applied: Tensor) -> None:
        """Counts one update, with what `apply_update` returned."""
        skipped = 1 - applied.to(torch.int64)
        self.total += skipped
        self.in_a_row.add_(1).mul_(skipped)

    def check(self, limit: int) -> None:
        """Raises FloatingPointError if this many updates in a row were skipped (0: never). The host
        waits."""
        if limit and (in_a_row := int(self.in_a_row)) >= limit:
            raise FloatingPointError(
                f"the gradients of the last {in_a_row} updates were not finite, none was applied: "
                "lower the learning rate, check the data of these steps, or raise "
                f"max_skipped_in_a_row={limit}"
            )

    def state_dict(self) -> dict[str, int]:
        """Both counts as plain numbers. The host waits."""
        return {"total": int(self.total), "in_a_row": int(self.in_a_row)}
