"""Which implementation each operation takes: the one place that picks.

The rule goes by device, dtype and shape, and is the same at every call. A user can insist on one
(`KernelConfig`); one that cannot run is then an error. An implementation that failed its check on
this machine (`longtake.ops.numerics`) is ruled out for the process, and "auto" goes on to the next.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from longtake.ops.triton_language import has_triton

Elementwise = Literal["triton", "reference"]
AttentionBackend = Literal["triton", "fa4", "cudnn", "sdpa", "reference"]
Kind = Literal["self_attention", "temporal_attention", "cross_attention"]


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Implementations by name, or "auto": the fastest that this machine's check has passed."""

    elementwise: Literal["auto", "triton", "reference"] = "auto"
    """Norm and modulation, gate and residual, GELU, and the optimizer's update."""
    self_attention: Literal["auto", "triton", "fa4", "cudnn", "sdpa", "reference"] = "auto"
    """Of all tokens, or of those of a frame."""
    temporal_attention: Literal["auto", "triton", "fa4", "cudnn", "sdpa", "reference"] = "auto"
    """Of the frames at one place."""
    cross_attention: Literal["auto", "triton", "sdpa", "reference"] = "auto"
    """Of tokens to text."""


PLAIN = KernelConfig(
    elementwise="reference",
    self_attention="reference",
    temporal_attention="reference",
    cross_attention="reference",
)
"""Plain torch with explicit softmax: what everything else is measured and checked against."""

# Those that tell the log-sum-exp of their scores (longtake.ops.partial_attention).
IN_PARTS: tuple[AttentionBackend, ...] = ("fa4", "cudnn", "reference")

# What our kernels keep on chip: the frames of a packed sequence, text tokens, values of a head. The
# packed kernel holds 128 frames in half precision, but one program to an SM at a time.
MAX_PACKED_FRAMES = 64
MAX_TEXT_TOKENS = 256
MAX_HEAD_SIZE = 128
# From this many keys on, FlashAttention-4's faster inner loop outweighs all else; where it was
# measured with fewer, heads of 72 on Hopper, from this many: 65,536 tokens forward and backward
# take it 3.15 ms at 1024 keys, ours 3.71 and cuDNN 3.89; at 256 1.56, 1.42, 1.74 (docs/log.md).
MIN_FA4_KEYS, MIN_FA4_KEYS_ON_HOPPER = 2048, 1024
# Heads that others pad to 128 and our flash attention takes as 64 and a tail of 16, and the most
# keys up to which that outweighs computing the scores twice in the backward (docs/benchmarks).
FLASH_HEAD_SIZES = range(65, 81)
MAX_FLASH_KEYS = 2048

_config = KernelConfig()
_ruled_out: dict[tuple[str, str], str] = {}


def use_kernels(config: KernelConfig) -> None:
    """Sets the choices of this process; call it before the first forward."""
    global _config
    _config = config


def current_kernels() -> KernelConfig:
    """What `use_kernels` set."""
    return _config


@contextmanager
def kernels_as(config: KernelConfig) -> Iterator[None]:
    """These choices within the context."""
    before = _config
    use_kernels(config)
    try:
        yield
    finally:
        use_kernels(before)


def rule_out(operation: str, name: str, reason: str) -> None:
    """Keeps "auto" from an implementation that failed its check here."""
    _ruled_out[operation, name] = reason


def ruled_out() -> dict[tuple[str, str], str]:
    """The reasons by (operation, name)."""
    return dict(_ruled_out)


def elementwise(x: torch.Tensor) -> Elementwise:
    """The implementation of an element-wise operation on this tensor."""
    return _elementwise(x.device)


# A compiled graph takes the answer for a constant: what leads to it cannot be traced.
@torch.compiler.assume_constant_result
def _elementwise(device: torch.device) -> Elementwise:
    if _config.elementwise == "triton" and (problem := triton_problem(device)):
        raise ValueError(
            f'element-wise operations by "triton" cannot run here: {problem}; set '
            f'kernels.elementwise to "auto" or "reference"'
        )
    if _config.elementwise != "auto":
        return _config.elementwise
    is_fast = runs_triton(device) and ("elementwise", "triton") not in _ruled_out
    return "triton" if is_fast else "reference"


@torch.compiler.assume_constant_result
def attention_backend(
    kind: Kind,
    *,
    keys: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    in_parts: bool = False,
) -> AttentionBackend:
    """The implementation of an attention with this many keys (for temporal: frames).

    in_parts: keys come in parts of so many, and it must tell the log-sum-exp of their scores.

    Raises:
        ValueError: the configuration insists on one that does not tell it.
    """
    asked = getattr(_config, kind)
    if in_parts and asked not in ("auto", *IN_PARTS):
        raise ValueError(
            f'{kind.replace("_", "-")} by "{asked}" does not tell the log-sum-exp of its scores, '
            f"by which a ring of processes adds up parts: set kernels.{kind} to "
            f"{', '.join(('auto', *IN_PARTS))}, or parallel.sp to a divisor of the model's heads"
        )
    if asked != "auto":
        return asked
    for name in _candidates(kind, keys=keys, head_size=head_size, dtype=dtype, device=device):
        if (kind, name) not in _ruled_out and (not in_parts or name in IN_PARTS):
            return name
    return "reference"


def _candidates(
    kind: Kind, *, keys: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> Iterator[AttentionBackend]:
    """From the fastest, as far as measured; docs/benchmarks has the figures."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    fuses = kind != "cross_attention" and device.type == "cuda" and is_half
    if fuses and head_size <= MAX_HEAD_SIZE and has_fa4(device):
        is_measured = head_size in FLASH_HEAD_SIZES and is_hopper(device)
        if keys >= (MIN_FA4_KEYS_ON_HOPPER if is_measured else MIN_FA4_KEYS):
            yield "fa4"
    if runs_triton(device) and (is_half or dtype == torch.float32) and head_size <= MAX_HEAD_SIZE:
        if kind == "temporal_attention" and keys <= MAX_PACKED_FRAMES:
            yield "triton"
        if kind == "cross_attention" and keys <= MAX_TEXT_TOKENS:
            yield "triton"
        pays = head_size in FLASH_HEAD_SIZES and keys <= MAX_FLASH_KEYS
        if kind == "self_attention" and is_half and pays:
            yield "triton"
    if fuses and head_size % 8 == 0 and head_size <= MAX_HEAD_SIZE and has_cudnn_attention(device):
        yield "cudnn"
    yield "sdpa"


def runs_triton(device: torch.device) -> bool:
    """Whether our Triton kernels can be launched on tensors of this device."""
    return has_triton and device.type == "cuda"


def is_interpreted() -> bool:
    """Whether Triton kernels are interpreted, which runs them on CPU tensors."""
    return has_triton and os.environ.get("TRITON_INTERPRET") == "1"


def triton_problem(device: torch.device) -> str | None:
    """Why our kernels cannot run on this device, or None if they can."""
    if not has_triton:
        return "Triton is not installed"
    if not runs_triton(device) and not is_interpreted():
        return f"it needs a CUDA device, not {device.type}"
    return None


@functools.cache
def has_cudnn_attention(device: torch.device) -> bool:
    """cuDNN's fused attention needs Ampere or newer."""
    return (
        device.type == "cuda"
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def has_fa4(device: torch.device) -> bool:
    """Whether FlashAttention-4 is installed and the device new enough (Hopper).

    Importing it takes seconds, so this only looks.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    package = importlib.util.find_spec("flash_attn")
    if package is None or not package.submodule_search_locations:
        return False
    return any(Path(folder, "cute").is_dir() for folder in package.submodule_search_locations)
