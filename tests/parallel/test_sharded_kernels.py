"""Models on the fused kernels, sharded over processes, compiled and checkpointed: the gradients of
one process in plain torch, and of a checkpointed block nothing kept but its inputs."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from longtake.models import build_model, init_weights
from longtake.ops.kernels import PLAIN, KernelConfig, kernels_as
from longtake.parallel import (
    ParallelConfig,
    build_mesh,
    materialize,
    parallelize,
    start_distributed,
)
from longtake.parallel.compile import compile_blocks
from tests.parallel.test_real_models import gradients_of, write_shaken
from tests.processes import run_in_processes

pytest.importorskip("triton")

FUSED = KernelConfig(
    elementwise="triton",
    self_attention="triton",
    temporal_attention="triton",
    cross_attention="triton",
)
SIZES = {"hidden_size": 32, "depth": 2, "num_heads": 2, "caption_channels": 8}


def _build(name: str):
    return build_model(name, size="tiny", max_caption_tokens=5, **SIZES)


POLICIES = ("none", "selective", "full")


def _sharded(name: str, is_compiled: bool):
    """By checkpointing policy: gradients, and how many values the blocks' forwards kept."""
    # Weights are freed between a block's forward and its backward.
    return {
        policy: _of_policy(name, ParallelConfig(checkpointing=policy, compile=is_compiled))
        for policy in POLICIES
    }


def _of_policy(name: str, config: ParallelConfig):
    # Tracing into forward and backward graphs is what could fail, not generating C++ from them.
    orchestrator = sys.modules["longtake.parallel.parallelize"]
    orchestrator.compile_blocks = lambda blocks: compile_blocks(blocks, backend="aot_eager")
    mesh = build_mesh(config, start_distributed("cpu"))
    with torch.device("meta"):
        model = _build(name)
    parallelize(model, mesh, config)
    materialize(model, mesh.device)
    init_weights(model, seed=0, write=write_shaken)
    kept, in_block = [0], [False]
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: in_block.__setitem__(0, True))
        block.register_forward_hook(lambda *_: in_block.__setitem__(0, False))

    def keep(x: torch.Tensor) -> torch.Tensor:
        # Weights are there anyway.
        is_weight = isinstance(x, torch.nn.Parameter)
        kept[0] += x.numel() if in_block[0] and not is_weight else 0
        return x

    with kernels_as(FUSED), saved_tensors_hooks(keep, lambda x: x):
        own = slice(mesh.dp_rank, mesh.dp_rank + 1)
        return gradients_of(model, name, own)[1], kept[0]


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True])
def test_sharded_model_on_fused_kernels_has_the_gradients_of_plain_torch(is_compiled):
    name = "stdit"
    plain = _build(name)
    init_weights(plain, seed=0, write=write_shaken)
    with kernels_as(PLAIN):
        _, expected = gradients_of(plain, name, slice(0, 2))
    kept = {}
    results = run_in_processes(_sharded, 2, name, is_compiled, timeout_seconds=250)
    for policy, (found, count) in results[0].items():
        kept[policy] = count
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=key)
    tokens = 3 * 2 * 3 * SIZES["hidden_size"]
    assert kept["selective"] > 10 * SIZES["depth"] * tokens
    # Two norms' outputs and four widths of activations.
    assert kept["none"] - kept["selective"] >= 6 * SIZES["depth"] * tokens
    # The tokens that each block was called with, and its small conditions.
    assert kept["full"] < 2 * SIZES["depth"] * tokens
