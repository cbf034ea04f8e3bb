"""Arithmetic about runs without running them: tokens, FLOPs, memory, what travels, hardware peaks,
disks. Plain numbers only."""

from longtake.planning.break_even import break_even_steps
from longtake.planning.communication import (
    ShardingTraffic,
    exchanged_bytes,
    exchanges_again,
    forwards_again,
    ring_bytes,
    sharding_traffic,
)
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
from longtake.planning.flops import (
    attention_macs,
    forward_macs,
    model_flops_utilization,
    training_flops,
)
from longtake.planning.hardware import peak_bf16_flops
from longtake.planning.layout import Layout, LayoutWork, Links, best_layout, layouts
from longtake.planning.memory import PeakMemory, peak_memory
from longtake.planning.sizes import parse_size, size_text
from longtake.planning.tokens import (
    TokenGrid,
    count_tokens,
    has_full_attention,
    latent_size,
    token_grid,
)

__all__ = [
    "FORMS",
    "Ceilings",
    "DiskPlan",
    "LatentForm",
    "Layout",
    "LayoutWork",
    "Links",
    "PeakMemory",
    "ShardingTraffic",
    "TokenGrid",
    "alternatives",
    "assumptions",
    "attention_macs",
    "attention_rate",
    "best_layout",
    "break_even_steps",
    "count_tokens",
    "exchanged_bytes",
    "exchanges_again",
    "floor_seconds",
    "forward_macs",
    "forwards_again",
    "has_full_attention",
    "latent_size",
    "layouts",
    "mean_tokens",
    "model_flops_utilization",
    "parse_size",
    "peak_bf16_flops",
    "peak_memory",
    "ring_bytes",
    "sharding_traffic",
    "size_text",
    "text_of_shape",
    "token_grid",
    "training_flops",
]
