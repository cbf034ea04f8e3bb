"""Self-attention through FlashAttention-4: the package `flash-attn-4`, imported only in this file.

On Hopper its gradient of q is wrong for heads of 72 and 80, without a warning. One kernel sums it
in tiles as wide as the head rounded up to 16 values, and the next reads them as if rounded up to
32. Here both round up to 32 (`_widen_tiles`). What lies beyond a head is read as zeros, which
change no score, and never written, so no tensor is padded. Where that cannot be done, heads are
padded in memory for the backward, to a size at which it is right.

Letters: B batch, N tokens, L keys where they are not the queries' tokens, A heads, E size per head,
P padded size per head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longtake.ops.attended import keeps_attended
from longtake.ops.kernels import is_hopper
from longtake.ops.operation import operation, register_autograd, register_fake
from longtake.ops.resize_heads import resize_heads

# Checked against explicit softmax in float64, forward and backward, on an H200 with 4.0.0b12: those
# at which all is right, and those at which it is once the tiles of its backward are wide enough.
RIGHT_HEAD_SIZES = (64, 96, 128)
RIGHT_HEAD_SIZES_OF_WIDE_TILES = (64, 72, 80, 88, 96, 128)
MIN_CAPABILITY = (9, 0)
PACKAGE = "flash-attn-4==4.0.0b12"


def padded_head_size(head_size: int, *, has_wide_tiles: bool = False) -> int:
    """The smallest head size not below this one at which the kernels are right.

    Raises:
        ValueError: there is none.
    """
    for size in RIGHT_HEAD_SIZES_OF_WIDE_TILES if has_wide_tiles else RIGHT_HEAD_SIZES:
        if head_size <= size:
            return size
    raise ValueError(f"FlashAttention-4 takes heads up to {RIGHT_HEAD_SIZES[-1]}, not {head_size}")


def _size_for(x: Tensor, *, is_forward: bool = False) -> int:
    """The size that heads of x are given to the kernels with. On Hopper the forward is right with
    tiles as they are, too."""
    is_wide = is_hopper(x.device) and (is_forward or _has_wide_tiles(_package()))
    return padded_head_size(x.shape[-1], has_wide_tiles=is_wide)


# Tracing takes its answer as a constant: a compiled graph is for one device, dtype and head size.
@torch.compiler.assume_constant_result
def fa4_problem(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why FlashAttention-4 cannot run on these, or None if it can. It imports the package."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_size > RIGHT_HEAD_SIZES[-1]:
        return f"it takes heads up to {RIGHT_HEAD_SIZES[-1]}, not {head_size}"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return "it needs a GPU of compute capability 9.0 or newer (Hopper)"
    try:
        _package()
    except ImportError as error:
        return str(error)
    return None


@functools.cache
def _package() -> ModuleType:
    """The package's own functions below its autograd.

    Raises:
        ImportError: it is not installed, or what it needs is not.
    """
    try:
        from flash_attn.cute import interface
    except ImportError as error:
        raise ImportError(
            f"FlashAttention-4 cannot be imported ({error}): pip install --pre {PACKAGE}"
        ) from error
    _widen_tiles(interface)
    return interface


def _widen_tiles(interface: Any) -> None:
    """Rounds the tiles of its backward on Hopper up to 32 values a head, as the kernels before and
    behind take them to be. In this process its own functions are right at 72 then, too.

    Of the version named here; in one that lacks what is changed, nothing is.
    """
    try:
        from flash_attn.cute.cache_utils import JITCache
    except ImportError:
        return
    original = getattr(interface, "FlashAttentionBackwardSm90", None)
    if original is None:
        return

    class WideTiles(original):
        def __init__(
            self,
            dtype: Any,
            head_dim: int,
            head_dim_v: int | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            super().__init__(dtype, head_dim, head_dim_v, *args, **kwargs)
            self.tile_hdim, self.tile_hdimv = (
                -(-size // 32) * 32 for size in (self.tile_hdim, self.tile_hdimv)
            )
            self.check_hdim_oob = head_dim != self.tile_hdim
            self.check_hdim_v_oob = (head_dim_v or head_dim) != self.tile_hdimv

    interface.FlashAttentionBackwardSm90 = WideTiles
    # Not one that others, with the tiles as they were, may have filled on disk.
    interface._flash_attn_bwd.compile_cache = JITCache()


def _has_wide_tiles(interface: ModuleType) -> bool:
    backward = getattr(interface, "FlashAttentionBackwardSm90", None)
    return getattr(backward, "__name__", None) == "WideTiles"


def fa4_attend(q_BNAE: Tensor, k_BLAE: Tensor, v_BLAE: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(E)) v, (B, N, A, E) and contiguous, and the log-sum-exp of each row of
    scores, (B, A, N) float32. No gradient flows through it."""
    head_size = q_BNAE.shape[-1]
    size = _size_for(q_BNAE, is_forward=True)
    q_BNAP, k_BLAP, v_BLAP = (resize_heads(x, size) for x in (q_BNAE, k_BLAE, v_BLAE))
    return _attend(q_BNAP, k_BLAP, v_BLAP, head_size=head_size)


def fa4_attend_backward(
    dout_BNAE: Tensor,
    q_BNAE: Tensor,
    k_BLAE: Tensor,
    v_BLAE: Tensor,
    out_BNAE: Tensor,
    logsumexp_BAN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v. With out and log-sum-exp over more keys than these, what these
    keys contribute to it."""
    head_size, size = q_BNAE.shape[-1], _size_for(q_BNAE)
    inputs = [resize_heads(x, size) for x in (q_BNAE, k_BLAE, v_BLAE)]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    _attend_backward(dout_BNAE, inputs, out_BNAE, logsumexp_BAN, gradients=[dq, dk, dv])
    return dq[..., :head_size], dk[..., :head_size], dv[..., :head_size]


def _attend(
    q_BNAP: Tensor, k_BLAP: Tensor, v_BLAP: Tensor, *, head_size: int
) -> tuple[Tensor, Tensor]:
    """On padded heads; the output of the heads as they were."""
    out_BNAP, logsumexp_BAN = _package()._flash_attn_fwd(
        q_BNAP,
        k_BLAP,
        v_BLAP,
        softmax_scale=head_size**-0.5,
        return_lse=True,
    )
    return resize_heads(out_BNAP, head_size), logsumexp_BAN


def _attend_backward(
    dout_BNAE: Tensor,
    inputs: Sequence[Tensor],  # q, k and v with padded heads
    out_BNAE: Tensor,
    logsumexp_BAN: Tensor,
    *,
    gradients: Sequence[Tensor],
) -> None:
    """Writes the gradients of q, k and v with padded heads."""
    dq_BNAP, dk_BLAP, dv_BLAP = gradients
    size = dq_BNAP.shape[-1]
    _package()._flash_attn_bwd(
        *inputs,
        resize_heads(out_BNAE, size),
        resize_heads(dout_BNAE, size).contiguous(),
        logsumexp_BAN,
        softmax_scale=dout_BNAE.shape[-1] ** -0.5,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dq=dq_BNAP,
        dk=dk_BLAP,
        dv=dv_BLAP,
    )


@operation("longtake::fa4_attention")
@keeps_attended
def _fa4_attention(
    qkv_BN3AE: Tensor,  # (B, N, 3, A, E), last dimension dense
) -> tuple[Tensor, Tensor]:
    """out (B, N, A, E) and, for the backward, the log-sum-exp of each row of scores (B, A, N)."""
    head_size = qkv_BN3AE.shape[-1]
    qkv_BN3AP = resize_heads(qkv_BN3AE, _size_for(qkv_BN3AE, is_forward=True))
    return _attend(*qkv_BN3AP.unbind(2), head_size=head_size)


@register_fake(_fa4_attention)
def _(qkv_BN3AE: Tensor) -> tuple[Tensor, Tensor]:
    B, N, _, A, E = qkv_BN3AE.shape
    return (
        qkv_BN3AE.new_empty(B, N, A, E),
        qkv_BN3AE.new_empty(B, A, N, dtype=torch.float32),
    )


@operation("longtake::fa4_attention_backward")
def _fa4_attention_backward(
    grad_out_BNAE: Tensor,  # (B, N, A, E)
    qkv_BN3AE: Tensor,  # (B, N, 3, A, E)
    out_BNAE: Tensor,  # (B, N, A, E)
    logsumexp_BAN: Tensor,  # (B, A, N) float32
) -> Tensor:
    """The gradient of qkv, (B, N, 3, A, E) and contiguous."""
    head_size = qkv_BN3AE.shape[-1]
    # Padded here, if at all: keeping the padded product from the forward would take a third more.
    qkv_BN3AP = resize_heads(qkv_BN3AE, _size_for(qkv_BN3AE))
    dqkv_BN3AP = torch.empty_like(qkv_BN3AP, memory_format=torch.contiguous_format)
    _attend_backward(
        grad_out_BNAE,
        qkv_BN3AP.unbind(2),
        out_BNAE,
        logsumexp_BAN,
        gradients=dqkv_BN3AP.unbind(2),
    )
    return resize_heads(dqkv_BN3AP, head_size)


@register_fake(_fa4_attention_backward)
def _(grad_out_BNAE: Tensor, qkv_BN3AE: Tensor, out_BNAE: Tensor, logsumexp_BAN: Tensor) -> Tensor:
    return qkv_BN3AE.new_empty(qkv_BN3AE.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    out_BNAE, logsumexp_BAN = output
    ctx.save_for_backward(*inputs, out_BNAE, logsumexp_BAN)
    # Else the unused gradient of the log-sum-exp would be filled with zeros at every call.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out_BNAE: Tensor, _: Tensor | None) -> Tensor:
    return _fa4_attention_backward(grad_out_BNAE, *ctx.saved_tensors)


register_autograd(_fa4_attention, _backward, setup_context=_save_for_backward)


def fa4_attention(qkv_BN3AE: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v from the packed product of q, k and v: (B, N, A, E), contiguous.

    The gradient of q is summed in no fixed order unless torch.use_deterministic_algorithms is on.

    Raises:
        ValueError: FlashAttention-4 is missing, or cannot run on this device, dtype or head size.
    """
    problem = fa4_problem(qkv_BN3AE.device, qkv_BN3AE.dtype, qkv_BN3AE.shape[-1])
    if problem:
        raise ValueError(f'attention by "fa4" cannot run here: {problem}; use "auto" or "cudnn"')
    return _fa4_attention(qkv_BN3AE)[0]
