"""What comes between the product of q, k, v and self-attention: q and k are RMS-normalized, and
turned by the angles of their frame.

Letters: B batch, T frames, S spatial patches, A heads, E size per head, F = E/2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.ops.elementwise import picks_triton
from longtake.ops.operation import operation, register_autograd, register_fake
from longtake.ops.qk_norm_rotary_kernel import launch_backward, launch_forward
from longtake.ops.rms_norm import rms_norm_reference
from longtake.ops.rotary import rotary_reference


def qk_norm_rotary_reference(
    qkv_BTS3AE: Tensor,
    q_weight_E: Tensor,
    k_weight_E: Tensor,
    sin_TF: Tensor | None = None,
    cos_TF: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """What `qk_norm_rotary` does, composed of plain torch."""
    q, k, v = qkv_BTS3AE.unbind(-3)
    q, k = rms_norm_reference(q, q_weight_E, eps), rms_norm_reference(k, k_weight_E, eps)
    if sin_TF is not None and cos_TF is not None:
        q, k = rotary_reference(q, sin_TF, cos_TF), rotary_reference(k, sin_TF, cos_TF)
    return torch.stack((q, k, v), dim=-3)


@operation("longtake::qk_norm_rotary")
def _forward(
    qkv: Tensor,
    q_weight_E: Tensor,
    k_weight_E: Tensor,
    sin_TF: Tensor | None,
    cos_TF: Tensor | None,
    eps: float,
) -> Tensor:
    return launch_forward(qkv, q_weight_E, k_weight_E, sin_TF, cos_TF, eps)


@register_fake(_forward)
def _(
    qkv: Tensor,
    q_weight_E: Tensor,
    k_weight_E: Tensor,
    sin_TF: Tensor | None,
    cos_TF: Tensor | None,
    eps: float,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


@operation("longtake::qk_norm_rotary_backward")
def _backward(
    dout: Tensor,
    qkv: Tensor,
    q_weight_E: Tensor,
    k_weight_E: Tensor,
    sin_TF: Tensor | None,
    cos_TF: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return launch_backward(dout, qkv, q_weight_E, k_weight_E, sin_TF, cos_TF, eps)


@register_fake(_backward)
def _(
    dout: Tensor,
    qkv: Tensor,
    q_weight_E: Tensor,
    k_weight_E: Tensor,
    sin_TF: Tensor | None,
    cos_TF: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), qkv.new_empty(2, qkv.shape[-1], dtype=torch.float32)


def _save_inputs(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    qkv, q_weight_E, k_weight_E, sin_TF, cos_TF = ctx.saved_tensors
    dqkv, dweights_2E = _backward(dout, qkv, q_weight_E, k_weight_E, sin_TF, cos_TF, ctx.eps)
    dq_weight_E = dweights_2E[0].to(q_weight_E.dtype)
    dk_weight_E = dweights_2E[1].to(k_weight_E.dtype)
    return dqkv, dq_weight_E, dk_weight_E, None, None, None


register_autograd(_forward, _differentiate, setup_context=_save_inputs)


def qk_norm_rotary(
    qkv_BTS3AE: Tensor,
    q_weight_E: Tensor,
    k_weight_E: Tensor,
    sin_TF: Tensor | None = None,
    cos_TF: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight of q and k over each head, then each pair of neighbours
    turned by the angle of its frame; v as it is. In the dtype of qkv, rounded once.

    Without sin and cos nothing is turned, and tokens may have any number of dimensions (qkv_BN3AE).
    sin and cos are float32, and so is the arithmetic. q, k and v stay one tensor, which attention
    reads in place: 6 passes over (tokens, hidden size) forward, 8 backward, copies of v included.

    Source: Zhang and Sennrich, arXiv:1910.07467; Su et al., arXiv:2104.09864.
    """
    if not picks_triton(qkv_BTS3AE):
        return qk_norm_rotary_reference(qkv_BTS3AE, q_weight_E, k_weight_E, sin_TF, cos_TF, eps)
    if sin_TF is not None and cos_TF is not None:
        sin_TF, cos_TF = sin_TF.float(), cos_TF.float()
    return _forward(qkv_BTS3AE, q_weight_E, k_weight_E, sin_TF, cos_TF, eps)
