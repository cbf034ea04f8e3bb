"""The first values of every weight, as in the original models, whatever the number of processes.

Each tensor is drawn whole, from a generator of its own that is seeded with its name: the order of
drawing and the sharding do not matter.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from longtake.randomness import named_seed

Rule = Callable[[Tensor, torch.Generator], Tensor]


def _zeros(full: Tensor, generator: torch.Generator) -> Tensor:
    return full.zero_()


def _ones(full: Tensor, generator: torch.Generator) -> Tensor:
    return full.fill_(1.0)


def _normal_002(full: Tensor, generator: torch.Generator) -> Tensor:
    return full.normal_(std=0.02, generator=generator)


def _normal_by_width(full: Tensor, generator: torch.Generator) -> Tensor:
    return full.normal_(std=full.shape[-1] ** -0.5, generator=generator)


def _xavier(full: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform with variance 2 / (inputs + outputs); a patch embedding counts as a linear layer."""
    outputs, inputs = full.shape[0], full[0].numel()
    bound = math.sqrt(6 / (inputs + outputs))
    return full.uniform_(-bound, bound, generator=generator)


# The first pattern found in a name decides. Zeros at the end of branches make every block the
# identity at first (DiT), or leave a PixArt that grows a temporal branch unchanged (STDiT).
_RULES: tuple[tuple[str, Rule], ...] = (
    (r"\.bias$", _zeros),
    (r"adaLN_modulation\.1\.weight$", _zeros),
    (r"^final_layer\.linear\.weight$", _zeros),
    (r"\.cross_attn\.proj\.weight$", _zeros),
    (r"\.attn_temp\.proj\.weight$", _zeros),
    (r"\.[qk]_norm\.weight$", _ones),
    (r"scale_shift_table(_temporal)?$", _normal_by_width),
    (r"^y_embedder\.y_embedding$", _normal_by_width),
    (r"^(t|y|csize|ar)_embedder\.(mlp\.[02]|y_proj\.fc[12]|embedding_table)\.weight$", _normal_002),
    (r"^t_block(_temp)?\.1\.weight$", _normal_002),
    (r"^x_embedder\.proj\.weight$", _xavier),
    (r"\.(qkv|proj|q_linear|kv_linear|fc1|fc2)\.weight$", _xavier),
)


# Threads that draw; more would wait for memory.
_MOST_WORKERS = 16


def _copy(target: Tensor, full: Tensor) -> None:
    target.copy_(full)


@torch.no_grad()
def init_weights(
    model: nn.Module, *, seed: int, write: Callable[[Tensor, Tensor], object] = _copy
) -> None:
    """Give every parameter and persistent buffer of a model its first value.

    `write(target, full)` stores the full float32 CPU tensor in a parameter or buffer of the model;
    the parallel layer passes one that keeps only this process's shard.
    """
    drawn: deque[tuple[Tensor, Future[Tensor]]] = deque()
    # An XL model takes eight seconds of one core. Few tensors wait for their turn, since all of
    # them together may be more than the host's memory.
    workers = min(os.cpu_count() or 1, _MOST_WORKERS)
    with ThreadPoolExecutor(workers) as pool:
        for name, target in model.state_dict(keep_vars=True).items():
            rule = next((rule for pattern, rule in _RULES if re.search(pattern, name)), None)
            assert rule is not None, f"no initialization rule fits {name!r}: add one to _RULES"
            drawn.append((target, pool.submit(_draw, rule, target.shape, named_seed(seed, name))))
            if len(drawn) > 2 * workers:
                target, full = drawn.popleft()
                write(target, full.result())
        for target, full in drawn:
            write(target, full.result())


@torch.no_grad()
def _draw(rule: Rule, shape: torch.Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return rule(torch.empty(shape, dtype=torch.float32, device="cpu"), generator)
