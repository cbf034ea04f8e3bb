"""Arithmetic about runs without running them: tokens, FLOPs, what travels, hardware peaks. Plain
numbers only."""

from longtake.planning.communication import exchanged_bytes
from longtake.planning.floor import Ceilings, attention_rate, floor_seconds
from longtake.planning.flops import forward_macs, model_flops_utilization, training_flops
from longtake.planning.hardware import peak_bf16_flops
from longtake.planning.tokens import TokenGrid, count_tokens, latent_size, token_grid

__all__ = [
    "Ceilings",
    "TokenGrid",
    "attention_rate",
    "count_tokens",
    "exchanged_bytes",
    "floor_seconds",
    "forward_macs",
    "latent_size",
    "model_flops_utilization",
    "peak_bf16_flops",
    "token_grid",
    "training_flops",
]
