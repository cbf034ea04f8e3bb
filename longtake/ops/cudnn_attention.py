"""Self-attention through PyTorch's cuDNN backend, called by name instead of by priority.

`scaled_dot_product_attention` picks a backend from process-wide switches, and compiled code keeps
whichever it saw. This operation is opaque to torch.compile and always cuDNN.

Letters: B batch, N tokens, L keys where they are not the queries' tokens, A heads, E size per head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longtake.ops import kernels
from longtake.ops.attended import keeps_attended
from longtake.ops.operation import operation, register_autograd, register_fake

aten = torch.ops.aten

MAX_HEAD_SIZE = 128


# Tracing takes its answer as a constant: a compiled graph is for one device, dtype and head size.
@torch.compiler.assume_constant_result
def cudnn_problem(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why cuDNN's attention cannot run on these, or None if it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_size % 8 or head_size > MAX_HEAD_SIZE:
        return f"it needs heads of a multiple of 8 up to {MAX_HEAD_SIZE}, not {head_size}"
    if not kernels.has_cudnn_attention(device):
        return "it needs a GPU of compute capability 8.0 or newer and PyTorch with cuDNN"
    return None


def cudnn_attend(q_BNAE: Tensor, k_BLAE: Tensor, v_BLAE: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(E)) v, (B, N, A, E) and contiguous, and the log-sum-exp of each row of
    scores, (B, A, N) float32. No gradient flows through it."""
    out_BANE, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(
        q_BNAE.transpose(1, 2),
        k_BLAE.transpose(1, 2),
        v_BLAE.transpose(1, 2),
        attn_bias=None,
        compute_log_sumexp=True,
        dropout_p=0.0,
        is_causal=False,
        return_debug_mask=False,
        scale=None,  # E ** -0.5
    )
    # PyTorch allocates out in the order of q's strides: this is no copy. The log-sum-exp has had
    # three and four dimensions in different versions.
    return out_BANE.transpose(1, 2).contiguous(), logsumexp.reshape(out_BANE.shape[:3])


def cudnn_attend_backward(
    dout_BNAE: Tensor,
    q_BNAE: Tensor,
    k_BLAE: Tensor,
    v_BLAE: Tensor,
    out_BNAE: Tensor,
    logsumexp_BAN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v. With out and log-sum-exp over more keys than these, what these
    keys contribute to it."""
    # Random numbers are for dropout alone. The kernels read nothing from these.
    unused_seed = torch.empty((), dtype=torch.int64, device=q_BNAE.device)
    gradients_BANE = aten._scaled_dot_product_cudnn_attention_backward(
        # PyTorch keeps cuDNN's backward graphs by the layout of q, k and v, and not of this
        # gradient. A second layout would be read as if it were the first, so there is only one.
        dout_BNAE.contiguous().transpose(1, 2),
        q_BNAE.transpose(1, 2),
        k_BLAE.transpose(1, 2),
        v_BLAE.transpose(1, 2),
        out_BNAE.transpose(1, 2),
        logsumexp_BAN.unsqueeze(-1),
        philox_seed=unused_seed,
        philox_offset=unused_seed,
        attn_bias=None,
        cum_seq_q=None,  # all sequences have the same length
        cum_seq_k=None,
        max_q=q_BNAE.shape[1],
        max_k=k_BLAE.shape[1],
        dropout_p=0.0,
        is_causal=False,
        scale=None,
    )
    dq_BNAE, dk_BLAE, dv_BLAE = (gradient.transpose(1, 2) for gradient in gradients_BANE)
    return dq_BNAE, dk_BLAE, dv_BLAE


@operation("longtake::cudnn_attention")
@keeps_attended
def _cudnn_attention(
    qkv_BN3AE: Tensor,  # (B, N, 3, A, E), last dimension dense
) -> tuple[Tensor, Tensor]:
    """out (B, N, A, E) and, for the backward, the log-sum-exp of each row of scores (B, A, N)."""
    return cudnn_attend(*qkv_BN3AE.unbind(2))


@register_fake(_cudnn_attention)
def _(qkv_BN3AE: Tensor) -> tuple[Tensor, Tensor]:
    B, N, _, A, E = qkv_BN3AE.shape
    return (
        qkv_BN3AE.new_empty(B, N, A, E),
        qkv_BN3AE.new_empty(B, A, N, dtype=torch.float32),
    )


@operation("longtake::cudnn_attention_backward")
def _cudnn_attention_backward(
    grad_out_BNAE: Tensor,  # (B, N, A, E)
    qkv_BN3AE: Tensor,  # (B, N, 3, A, E)
    out_BNAE: Tensor,  # (B, N, A, E)
    logsumexp_BAN: Tensor,  # (B, A, N) float32
) -> Tensor:
    """The gradient of qkv, (B, N, 3, A, E) and contiguous."""
    q_BNAE, k_BNAE, v_BNAE = qkv_BN3AE.unbind(2)
    gradients_BNAE = cudnn_attend_backward(
        grad_out_BNAE, q_BNAE, k_BNAE, v_BNAE, out_BNAE, logsumexp_BAN
    )
    return torch.stack(gradients_BNAE, dim=2)


@register_fake(_cudnn_attention_backward)
def _(grad_out_BNAE: Tensor, qkv_BN3AE: Tensor, out_BNAE: Tensor, logsumexp_BAN: Tensor) -> Tensor:
    return qkv_BN3AE.new_empty(qkv_BN3AE.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    out_BNAE, logsumexp_BAN = output
    ctx.save_for_backward(*inputs, out_BNAE, logsumexp_BAN)
    # Else the unused gradient of the log-sum-exp would be filled with zeros at every call.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out_BNAE: Tensor, _: Tensor | None) -> Tensor:
    return _cudnn_attention_backward(grad_out_BNAE, *ctx.saved_tensors)


register_autograd(_cudnn_attention, _backward, setup_context=_save_for_backward)


def cudnn_attention(qkv_BN3AE: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v from the packed product of q, k and v: (B, N, A, E), contiguous.

    cuDNN reads q, k and v where they lie. The gradients of q and k are summed in no fixed order,
    so they may differ by rounding from run to run.

    Raises:
        ValueError: cuDNN cannot run on this device, dtype or head size.
    """
    problem = cudnn_problem(qkv_BN3AE.device, qkv_BN3AE.dtype, qkv_BN3AE.shape[-1])
    if problem:
        raise ValueError(f'attention by "cudnn" cannot run here: {problem}; use "auto" or "sdpa"')
    return _cudnn_attention(qkv_BN3AE)[0]
