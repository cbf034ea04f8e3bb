"""Exponential moving average of the weights: fp32, sharded like them, updated without waiting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longtake.parallel import drop_gathered, local_part, local_parts

_lerp_all = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The average that samples are drawn from."""

    decay: float = 0.9999
    warmup: bool = True
    """Begin with a short memory, min(decay, (1 + n) / (10 + n)) at update n: else the first
    weights, which know nothing, still weigh 37 % after 10,000 updates."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"ema.decay={self.decay} must be in [0, 1): 0.9999 averages over the last 10,000 "
                "steps or so, 0 keeps no average"
            )


class Averaged(NamedTuple):
    """A parameter and its average, both sharded or not."""

    name: str
    param: nn.Parameter
    average: Tensor


class Ema:
    """Averages of a model's parameters under their names. The model must be on its device and
    sharded."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self._model = model
        # The sharded parameters themselves: while FSDP has gathered a unit, the module shows
        # others.
        drop_gathered(model)
        self._params = dict(model.named_parameters())
        self.averages: dict[str, Tensor] = {
            name: param.detach().clone().float() for name, param in self._params.items()
        }

    @torch.no_grad()
    def update(self, step: int, applied: Tensor | None = None) -> None:
        """Moves the averages towards the weights after update number `step`, counted from 0.

        average += applied * (1 - decay) * (param - average); a skipped update (`applied` 0.0, a
        tensor on the device) leaves the averages as they are.
        """
        move_averages(list(self.pairs()), 1 - decay_at(step, self.config), applied)

    def pairs(self) -> Iterator[Averaged]:
        """All parameters with their averages."""
        for name, param in self._params.items():
            yield Averaged(name, param, self.averages[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the context the model holds the averages; afterwards its own weights again, bit
        for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # Both before and after: the model must not go on with copies that it gathered from other
        # weights.
        drop_gathered(self._model)
        for _, param, average in self.pairs():
            param, average = local_part(param), local_part(average)
            assert param.dtype == average.dtype, "swapping needs fp32 weights"
            held = param.clone()
            param.copy_(average)
            average.copy_(held)
        drop_gathered(self._model)


@torch.no_grad()
def move_averages(pairs: Sequence[Averaged], rate: float, applied: Tensor | None = None) -> None:
    """Averages go this part of the way to their parameters, or stay where `applied` is 0.0."""
    params = local_parts([one.param for one in pairs])
    averages = local_parts([one.average for one in pairs])
    _lerp_all(averages, params, rate if applied is None else [applied * rate] * len(averages))


def decay_at(step: int, config: EmaConfig) -> float:
    """The decay used after update number `step`, counted from 0."""
    if not config.warmup:
        return config.decay
    return min(config.decay, (1 + step) / (10 + step))
