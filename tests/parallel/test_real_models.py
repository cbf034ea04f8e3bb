"""The models that we train, sharded, checkpointed and compiled: the gradients of one process."""

from __future__ import annotations

import sys

import pytest
import torch

from longtake.models import build_model, init_weights
from longtake.parallel import (
    ParallelConfig,
    build_mesh,
    drop_gathered,
    materialize,
    parallelize,
    read_full,
    start_distributed,
    write_full,
)
from longtake.parallel.compile import compile_blocks
from tests.processes import run_in_processes

NAMES = ("dit", "pixart", "stdit", "stdit2", "latte")
SIZES = {"hidden_size": 24, "depth": 2, "num_heads": 2, "caption_channels": 8, "num_classes": 3}


def build(name: str):
    return build_model(name, size="tiny", max_caption_tokens=5, **SIZES)


def write_shaken(param: torch.Tensor, full: torch.Tensor) -> None:
    """Zero-initialized gates would hide whole branches: move every weight off zero."""
    generator = torch.Generator().manual_seed(full.numel())
    write_full(param, full + 0.05 * torch.randn(full.shape, generator=generator))


def gradients_of(model, name: str, samples: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    latents_BCTHW = torch.randn(2, 4, 3, 4, 6, generator=generator)
    t_B = torch.tensor([10.0, 900.0])
    if model.condition == "text":
        condition = {
            "prompt_embeds_BLK": torch.randn(2, 5, 8, generator=generator)[samples],
            "prompt_mask_BL": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()[samples],
        }
    else:
        condition = {"labels_B": torch.tensor([0, 2])[samples]}
    out = model(latents_BCTHW[samples], t_B[samples], **condition)
    loss = out.float().square().mean()
    loss.backward()
    drop_gathered(model)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {n: read_full(g) for n, g in grads.items()}


def _sharded(name: str, config: ParallelConfig):
    # Tracing is what could fail; generating C++ on top would only take time.
    orchestrator = sys.modules["longtake.parallel.parallelize"]
    orchestrator.compile_blocks = lambda blocks: compile_blocks(blocks, backend="eager")
    mesh = build_mesh(config, start_distributed("cpu"))
    with torch.device("meta"):
        model = build(name)
    parallelize(model, mesh, config)
    materialize(model, mesh.device)
    init_weights(model, seed=0, write=write_shaken)
    return gradients_of(model, name, slice(mesh.dp_rank, mesh.dp_rank + 1))[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_sharded_checkpointed_and_compiled_gradients_are_the_same(name):
    plain = build(name)
    init_weights(plain, seed=0, write=write_shaken)
    _, expected = gradients_of(plain, name, slice(0, 2))
    config = ParallelConfig(checkpointing="full", compile=True)
    found = run_in_processes(_sharded, 2, name, config, timeout_seconds=120)[0]
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=key)
