"""How latent statistics lie in a store: bfloat16, or 8 bits with a range per channel and frame.

8-bit form, for every channel c and frame t:   value = low[c, t] + step[c, t] * byte
with low the smallest value and 255 steps up to the largest.

Letters: C channels, T frames, H W latent height and width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

Form = Literal["bf16", "8bit"]
Shape = tuple[int, int, int, int]  # C, T, H, W


def record_bytes(shape: Shape, form: Form, *, with_posterior: bool) -> int:
    """Size of one clip's statistics."""
    values, ranges = math.prod(shape), 2 * shape[0] * shape[1]
    one = 2 * values if form == "bf16" else values + 4 * ranges
    return 2 * one if with_posterior else one


def pack(mean_CTHW: Tensor, logvar_CTHW: Tensor | None, form: Form) -> list[tuple[str, Tensor]]:
    """The tensors of one clip, in their order in the file, with the ends of their names."""
    stats = [("mean", mean_CTHW)]
    if logvar_CTHW is not None:
        stats.append(("logvar", logvar_CTHW))
    if form == "bf16":
        return [(name, values.bfloat16()) for name, values in stats]
    if mean_CTHW.numel() * len(stats) % 4:
        raise ValueError(
            f"latents of shape {tuple(mean_CTHW.shape)} are no multiple of 4 values, which the "
            "8-bit form needs to keep its ranges aligned: use --latents bf16"
        )
    ranges_and_bytes = [(name, *_to_8_bits(values)) for name, values in stats]
    ranges = [(f"{name}.range", range_2CT) for name, range_2CT, _ in ranges_and_bytes]
    return ranges + [(name, bytes_CTHW) for name, _, bytes_CTHW in ranges_and_bytes]


def unpack(record: Tensor, shape: Shape, form: Form) -> tuple[Tensor, Tensor | None]:
    """Mean and log-variance of one clip from its bytes (uint8): bfloat16, or float32 from 8 bits.

    Raises:
        ValueError: the number of bytes is that of no such record.
    """
    sizes = {record_bytes(shape, form, with_posterior=count == 2): count for count in (1, 2)}
    if len(record) not in sizes:
        raise ValueError(f"{len(record)} bytes for latents of shape {shape} as {form}")
    count = sizes[len(record)]
    if form == "bf16":
        stats = list(record.view(torch.bfloat16).view(count, *shape))
    else:
        num_ranges = 2 * shape[0] * shape[1]
        ranges = record[: count * num_ranges * 4].view(torch.float32)
        ranges = ranges.view(count, 2, shape[0], shape[1], 1, 1)
        values = record[count * num_ranges * 4 :].view(count, *shape)
        stats = [low + step * value for (low, step), value in zip(ranges, values, strict=True)]
    return stats[0], stats[1] if count == 2 else None


def _to_8_bits(values_CTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Range (2, C, T): low and step, float32; and bytes."""
    values_CTHW = values_CTHW.float()
    low_CT, high_CT = values_CTHW.amin((2, 3)), values_CTHW.amax((2, 3))
    step_CT = (high_CT - low_CT) / 255
    # A constant plane has no steps; any number but zero can divide it.
    divisor_CT = torch.where(step_CT > 0, step_CT, 1.0)
    bytes_CTHW = (values_CTHW - low_CT[..., None, None]) / divisor_CT[..., None, None]
    return torch.stack((low_CT, step_CT)), bytes_CTHW.round().clamp(0, 255).to(torch.uint8)


@dataclass
class FormError:
    """What 8 bits lose against bfloat16, as sums over many clips, in the transformer's units."""

    count: int = 0
    sum: float = 0.0
    square: float = 0.0
    error_square: float = 0.0
    error_max: float = 0.0
    deviation_square: float = 0.0
    """Of the posterior's standard deviations."""
    deviation_error_square: float = 0.0

    def add(
        self,
        mean_CTHW: Tensor,
        logvar_CTHW: Tensor | None,
        packed: list[tuple[str, Tensor]],
        scale_C: Tensor,
    ) -> None:
        """Counts one clip: its statistics, and what they became."""
        shape: Shape = tuple(mean_CTHW.shape)  # type: ignore[assignment]
        record = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in packed])
        mean, logvar = unpack(record, shape, "8bit")
        scale_C111 = scale_C.view(-1, 1, 1, 1).double()
        exact = mean_CTHW.bfloat16().double() * scale_C111
        error = mean.double() * scale_C111 - exact
        self.count += exact.numel()
        self.sum += float(exact.sum())
        self.square += float(exact.square().sum())
        self.error_square += float(error.square().sum())
        self.error_max = max(self.error_max, float(error.abs().max()))
        if logvar is not None and logvar_CTHW is not None:
            deviation = torch.exp(0.5 * logvar_CTHW.bfloat16().double()) * scale_C111
            error = torch.exp(0.5 * logvar.double()) * scale_C111 - deviation
            self.deviation_square += float(deviation.square().sum())
            self.deviation_error_square += float(error.square().sum())

    def merge(self, other: FormError) -> None:
        for field in fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            both = max(mine, others) if field.name == "error_max" else mine + others
            setattr(self, field.name, both)

    def summary(self) -> dict[str, float]:
        """Root-mean-square error, the latents' own deviation, the largest error; all in the units
        that the transformer sees. For the posterior's deviations the error relative to them."""
        if not self.count:
            return {}
        variance = max(0.0, self.square / self.count - (self.sum / self.count) ** 2)
        result = {
            "rms_error": math.sqrt(self.error_square / self.count),
            "largest_error": self.error_max,
            "latents_std": math.sqrt(variance),
        }
        if self.deviation_square:
            relative = math.sqrt(self.deviation_error_square / self.deviation_square)
            result["posterior_std_relative_error"] = relative
        return result
