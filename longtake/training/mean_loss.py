"""The training loss of a log line: the mean since the line before, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.parallel import mean_over_processes


class MeanLoss:
    """Mean over steps and processes since the last report. Saved and restored with a checkpoint, so
    that a resumed run logs what the uninterrupted one would have."""

    def __init__(self, device: torch.device, *, total: float = 0.0, steps: int = 0) -> None:
        self._total = torch.tensor(total, dtype=torch.float64, device=device)
        self._steps = steps

    def add(self, loss: Tensor) -> None:
        """Counts one step's mean loss."""
        self._total += loss.detach()
        self._steps += 1

    def report(self) -> Tensor:
        """The mean, float32 (), after which counting begins anew. The host does not wait."""
        mean = mean_over_processes(self._total / self._steps).float()
        self._total.zero_()
        self._steps = 0
        return mean

    def state_dict(self) -> dict[str, float]:
        """What has been counted, as plain numbers, alike on all processes. The host waits."""
        return {"total": mean_over_processes(self._total).item(), "steps": self._steps}
