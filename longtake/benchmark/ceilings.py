"""What this device can do at best, measured in the same run as the steps: products, copies,
attention.

All on random normal data. The attention is the fastest that PyTorch brings, at the heads of the XL
models (16 of 72) and 65,536 tokens in all: a floor that counts on no kernel of our own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longtake.planning import Ceilings

# Fastest first; each falls back on the next where it cannot run.
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_HEADS, _HEAD_SIZE = 16, 72


@dataclass(frozen=True)
class _Sizes:
    square: int
    rows: int  # tokens in a product of weights
    copy_bytes: int
    keys: tuple[int, ...]
    tokens: int  # in an attention


_GPU = _Sizes(8192, 65_536, 2**32, (256, 1024, 4096, 16_384, 65_536), 65_536)
# Enough to try the command on a processor.
_CPU = _Sizes(256, 32, 2**24, (16, 64), 64)
# About 20 ms.
_HEAD_START_CYCLES = 40_000_000
# The products of an XL block: q, k and v; output; both layers of the MLP.
LINEARS = ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152))


def measure_ceilings(device: torch.device) -> Ceilings:
    """About five seconds on a GPU."""
    sizes = _GPU if device.type == "cuda" else _CPU
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def product(m: int, k: int, n: int) -> float:
        a, b = random(m, k), random(k, n)
        return 2 * m * k * n / seconds_of(lambda: a @ b, device)

    linears = [product(sizes.rows, k, n) for k, n in LINEARS]
    return Ceilings(
        matmul_flops=product(sizes.square, sizes.square, sizes.square),
        linear_flops=math.exp(statistics.fmean(map(math.log, linears))),
        copy_bytes=_copy(sizes.copy_bytes, device),
        attention_flops=tuple(
            (keys, _attention(random, device, sizes.tokens // keys, keys)) for keys in sizes.keys
        ),
    )


def _copy(count: int, device: torch.device) -> float:
    """Bytes read and written per second."""
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * count / seconds_of(lambda: target.copy_(source), device)


def _attention(
    random: Callable[..., torch.Tensor], device: torch.device, batch: int, keys: int
) -> float:
    """FLOP/s of forward and backward, 3.5 times the forward's."""
    q, k, v = (random(batch, _HEADS, keys, _HEAD_SIZE).requires_grad_() for _ in range(3))
    gradient = random(batch, _HEADS, keys, _HEAD_SIZE)

    def run() -> None:
        with sdpa_kernel(_BACKENDS, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(out, (q, k, v), gradient)

    flops = 3.5 * 4 * batch * keys**2 * _HEADS * _HEAD_SIZE
    return flops / seconds_of(run, device, repeats=5)


def seconds_of(
    run: Callable[[], object], device: torch.device, *, repeats: int = 10, warmup: int = 3
) -> float:
    """The median time of a call after a few of warm-up; on a GPU its own, not the host's."""
    for _ in range(warmup):
        run()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    # The device is kept busy until the host has all calls in its queue: short kernels would
    # otherwise be timed by how fast they are launched.
    torch.cuda._sleep(_HEAD_START_CYCLES)
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairwise(events)) / 1000
