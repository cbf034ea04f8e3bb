"""How fast the run is: samples, tokens and FLOPs per second of training time, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from longtake.planning import model_flops_utilization


@dataclass(frozen=True)
class Throughput:
    """The steps since the last report. Rates of all processes together unless the name says
    otherwise."""

    step_seconds: float  # mean
    samples_per_second: float
    tokens_per_second: float
    tokens_per_second_per_device: float
    seconds_left: float  # at this speed, pauses not counted
    mfu: float | None  # model FLOPs / time / peak; None if either is unknown


class ThroughputMeter:
    """Measures wall-clock time between reports without waiting for the device.

    The host runs ahead of the device by at most the steps between two reports, so a rate is right
    on average over reports, not for a single step. `num_devices` divides for the figures per
    device; `peak_flops_per_second` is that of one device.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        num_devices: int,
        peak_flops_per_second: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total_steps = total_steps
        self._num_devices = num_devices
        self._peak = peak_flops_per_second
        self._clock = clock
        self._restart()

    def add(self, *, samples: int, tokens: int, flops: float | None = None) -> None:
        """Counts one optimizer step, with what all processes together did in it."""
        self._steps += 1
        self._samples += samples
        self._tokens += tokens
        self._flops = None if self._flops is None or flops is None else self._flops + flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not training time: validation, sampling, waiting for a checkpoint."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def report(self, steps_done: int) -> Throughput:
        """Rates since the last report, which this one ends. `steps_done` counts from the run's very
        start."""
        assert self._steps > 0, "nothing was added since the last report"
        seconds = max(self._clock() - self._start - self._paused, 1e-9)
        mfu = None
        if self._flops is not None:
            mfu = model_flops_utilization(
                flops_per_sample=self._flops / self._samples,
                samples_per_second=self._samples / seconds,
                num_gpus=self._num_devices,
                peak_flops=self._peak,
            )
        result = Throughput(
            step_seconds=seconds / self._steps,
            samples_per_second=self._samples / seconds,
            tokens_per_second=self._tokens / seconds,
            tokens_per_second_per_device=self._tokens / seconds / self._num_devices,
            seconds_left=max(0, self._total_steps - steps_done) * seconds / self._steps,
            mfu=mfu,
        )
        self._restart()
        return result

    def _restart(self) -> None:
        self._start = self._clock()
        self._paused = 0.0
        self._steps = self._samples = self._tokens = 0
        self._flops: float | None = 0.0


def speed_metrics(speed: Throughput, device: torch.device) -> dict[str, float]:
    """Speeds and peak memory, under their names in the metrics."""
    values = {
        "speed/step_seconds": speed.step_seconds,
        "speed/samples_per_second": speed.samples_per_second,
        "speed/tokens_per_second": speed.tokens_per_second,
        "speed/tokens_per_second_per_device": speed.tokens_per_second_per_device,
    }
    if speed.mfu is not None:
        values["speed/mfu"] = speed.mfu
    if device.type == "cuda":
        values["memory/peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        values["memory/peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return values
