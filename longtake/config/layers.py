"""Which implementation each kind of layer of a run takes, at its own shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longtake.config.run import RunConfig
from longtake.ops.kernels import (
    Kind,
    attention_backend,
    elementwise,
    kernels_as,
    rule_out,
    ruled_out,
)
from longtake.parallel import attention_degrees, compute_dtype, gather_json
from longtake.planning import has_full_attention, token_grid


@dataclass(frozen=True)
class AttentionLayer:
    """One kind of attention that a model has."""

    name: str
    kind: Kind
    keys: int
    in_parts: bool = False
    """Whether keys come in parts, around a ring of processes: `keys` are those of a part."""


def ring_size(config: RunConfig, sp: int | None = None) -> int:
    """How many of sp processes pass keys and values around; 1 where nothing but all-to-alls is
    needed."""
    if not has_full_attention(config.model.name):
        return 1
    _, _, num_heads = config.model.dimensions
    return attention_degrees(config.parallel.sp if sp is None else sp, num_heads)[1]


def attention_layers(config: RunConfig, latents: tuple[int, int, int]) -> list[AttentionLayer]:
    """The kinds of attention in a model on so many latent frames, rows and columns."""
    model = config.model
    grid = token_grid(latents, patch=model.patch_size)
    if has_full_attention(model.name):
        sp, ring = config.parallel.sp, ring_size(config)
        keys = grid.total if ring == 1 else -(-grid.total // sp) * (sp // ring)
        found = [AttentionLayer("full", "self_attention", keys, in_parts=ring > 1)]
    else:
        found = [
            AttentionLayer("spatial", "self_attention", grid.space),
            AttentionLayer("temporal", "temporal_attention", grid.time),
        ]
    if model.name not in ("dit", "latte"):
        found.append(AttentionLayer("text", "cross_attention", model.max_caption_tokens))
    return found


def kernels_by_layer(
    config: RunConfig, latents: tuple[int, int, int], device: torch.device
) -> dict[str, str]:
    """The implementation by kind of layer, those of `KernelConfig` that are "auto" resolved."""
    _, hidden_size, num_heads = config.model.dimensions
    dtype = compute_dtype(config.parallel, device)
    with kernels_as(config.kernels):
        found: dict[str, str] = {
            layer.name: attention_backend(
                layer.kind,
                in_parts=layer.in_parts,
                keys=layer.keys,
                head_size=hidden_size // num_heads,
                dtype=dtype,
                device=device,
            )
            for layer in attention_layers(config, latents)
        }
        found["element-wise"] = elementwise(torch.empty(0, dtype=dtype, device=device))
    return found


def verify_kernels(
    config: RunConfig, shapes: Sequence[tuple[int, int, int]], device: torch.device
) -> list[str]:
    """Checks the kernels that a run is about to use against plain torch; why any of them failed.

    What "auto" had chosen and fails on one process is ruled out on all: with different kernels they
    would wait for each other at different collectives. Takes seconds on a GPU.
    """
    from longtake.ops.numerics import AttentionUse, verify_chosen  # defines every kernel

    _, hidden_size, num_heads = config.model.dimensions
    uses = {
        AttentionUse(
            kind=layer.kind,
            keys=layer.keys,
            head_size=hidden_size // num_heads,
            num_heads=num_heads,
            in_parts=layer.in_parts,
        )
        for latents in shapes
        for layer in attention_layers(config, latents)
    }
    with kernels_as(config.kernels):
        results = verify_chosen(
            device,
            compute_dtype(config.parallel, device),
            attentions=sorted(uses, key=lambda use: (use.kind, use.keys)),
            hidden_size=hidden_size,
        )
    for process in gather_json([[*choice, why] for choice, why in ruled_out().items()]):
        for operation, name, why in process:
            rule_out(operation, name, why)
    return [result.reason for result in results if not result.passed]
