"""Arithmetic about runs without running them: tokens, FLOPs, what travels, hardware peaks, disks.
Plain numbers only."""

from longtake.planning.break_even import break_even_steps
from longtake.planning.communication import exchanged_bytes, ring_bytes
from longtake.planning.disk import (
    FORMS,
    DiskPlan,
    LatentForm,
    alternatives,
    assumptions,
    mean_tokens,
    text_of_shape,
)
from longtake.planning.floor import Ceilings, attention_rate, floor_seconds
from longtake.planning.flops import forward_macs, model_flops_utilization, training_flops
from longtake.planning.hardware import peak_bf16_flops
from longtake.planning.sizes import parse_size, size_text
from longtake.planning.tokens import TokenGrid, count_tokens, latent_size, token_grid

__all__ = [
    "FORMS",
    "Ceilings",
    "DiskPlan",
    "LatentForm",
    "TokenGrid",
    "alternatives",
    "assumptions",
    "attention_rate",
    "break_even_steps",
    "count_tokens",
    "exchanged_bytes",
    "floor_seconds",
    "forward_macs",
    "latent_size",
    "mean_tokens",
    "model_flops_utilization",
    "parse_size",
    "peak_bf16_flops",
    "ring_bytes",
    "size_text",
    "text_of_shape",
    "token_grid",
    "training_flops",
]
