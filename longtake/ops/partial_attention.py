"""Attention of queries to a part of the keys, for callers that put the parts together.

What a part gives is its output and the log-sum-exp of each row of scores. Two parts make one by

    lse = log(exp(lse_1) + exp(lse_2))      out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

and in the backward, a part that is given output and log-sum-exp over all keys computes exactly what
its keys contribute: weights are exp(score - lse), whichever keys there are.

These are plain functions, without a gradient of their own: the caller's backward calls theirs.

Source: Liu et al., "Ring attention with blockwise transformers", arXiv:2310.01889.

Letters: B batch, N queries, L keys, A heads, E size per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.ops import kernels
from longtake.ops.attention import backend_problem
from longtake.ops.cudnn_attention import cudnn_attend, cudnn_attend_backward
from longtake.ops.fa4_attention import fa4_attend, fa4_attend_backward

_FUSED = {
    "cudnn": (cudnn_attend, cudnn_attend_backward),
    "fa4": (fa4_attend, fa4_attend_backward),
}


# Tracing takes its answer as a constant: a compiled graph is for one device, dtype and head size.
@torch.compiler.assume_constant_result
def pick_partial_backend(
    *, keys: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> kernels.AttentionBackend:
    """The implementation that attends to so many keys at a time, one of `kernels.IN_PARTS`.

    Raises:
        ValueError: the configuration insists on one that cannot, or not here.
    """
    backend = kernels.attention_backend(
        "self_attention",
        keys=keys,
        head_size=head_size,
        dtype=dtype,
        device=device,
        in_parts=True,
    )
    problem = backend_problem(backend, device, dtype, head_size)
    if problem:
        raise ValueError(f'attention by "{backend}" cannot run here: {problem}; use "auto"')
    return backend


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which parts are added up and log-sum-exps are kept."""
    return torch.promote_types(dtype, torch.float32)


def partial_attention(
    backend: str, q_BNAE: Tensor, k_BLAE: Tensor, v_BLAE: Tensor
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(E)) v over these keys, (B, N, A, E), and the log-sum-exp of each row of
    scores (B, A, N), at least float32."""
    if backend == "reference":
        return partial_attention_reference(q_BNAE, k_BLAE, v_BLAE)
    return _FUSED[backend][0](q_BNAE, k_BLAE, v_BLAE)


def partial_attention_backward(
    backend: str,
    dout_BNAE: Tensor,
    q_BNAE: Tensor,
    k_BLAE: Tensor,
    v_BLAE: Tensor,
    out_BNAE: Tensor,
    lse_BAN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys contribute to the gradient of q, and the gradients of k and v.

    out_BNAE and lse_BAN are those over all keys.
    """
    arguments = dout_BNAE, q_BNAE, k_BLAE, v_BLAE, out_BNAE, lse_BAN
    if backend == "reference":
        return partial_attention_backward_reference(*arguments)
    return _FUSED[backend][1](*arguments)


def merge_part(out_BNAE: Tensor, lse_BAN: Tensor, part_BNAE: Tensor, part_lse_BAN: Tensor) -> None:
    """Adds a part to those before it, in place; out_BNAE is in at least float32."""
    # exp(part_lse) / (exp(lse) + exp(part_lse)), without an exponential that could overflow.
    weight_BAN = torch.sigmoid(part_lse_BAN - lse_BAN).to(out_BNAE.dtype)
    out_BNAE.lerp_(part_BNAE.to(out_BNAE.dtype), weight_BAN.transpose(1, 2).unsqueeze(-1))
    torch.logaddexp(lse_BAN, part_lse_BAN, out=lse_BAN)


def partial_attention_reference(
    q_BNAE: Tensor, k_BLAE: Tensor, v_BLAE: Tensor
) -> tuple[Tensor, Tensor]:
    """`partial_attention` with explicit scores."""
    scores_BANL = _scores(q_BNAE, k_BLAE)
    weights_BANL = scores_BANL.softmax(dim=-1)
    out_BNAE = torch.einsum("banl,blae->bnae", weights_BANL, v_BLAE.to(weights_BANL.dtype))
    return out_BNAE.to(q_BNAE.dtype).contiguous(), scores_BANL.logsumexp(dim=-1)


def partial_attention_backward_reference(
    dout_BNAE: Tensor,
    q_BNAE: Tensor,
    k_BLAE: Tensor,
    v_BLAE: Tensor,
    out_BNAE: Tensor,
    lse_BAN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`partial_attention_backward` with explicit scores.

    weights = exp(scores - lse), dweights = dout v^T, dv = weights^T dout,
    dscores = weights * (dweights - sum(dout * out)), dq = dscores k, dk = dscores^T q.
    """
    dtype = accumulation_dtype(q_BNAE.dtype)
    dout_BNAE, out_BNAE = dout_BNAE.to(dtype), out_BNAE.to(dtype)
    weights_BANL = (_scores(q_BNAE, k_BLAE) - lse_BAN[..., None]).exp()
    dweights_BANL = torch.einsum("bnae,blae->banl", dout_BNAE, v_BLAE.to(dtype))
    delta_BAN = (dout_BNAE * out_BNAE).sum(-1).transpose(1, 2)
    dscores_BANL = weights_BANL * (dweights_BANL - delta_BAN[..., None]) * q_BNAE.shape[-1] ** -0.5
    dq_BNAE = torch.einsum("banl,blae->bnae", dscores_BANL, k_BLAE.to(dtype))
    dk_BLAE = torch.einsum("banl,bnae->blae", dscores_BANL, q_BNAE.to(dtype))
    dv_BLAE = torch.einsum("banl,bnae->blae", weights_BANL, dout_BNAE)
    return dq_BNAE.to(q_BNAE.dtype), dk_BLAE.to(k_BLAE.dtype), dv_BLAE.to(v_BLAE.dtype)


def _scores(q_BNAE: Tensor, k_BLAE: Tensor) -> Tensor:
    dtype = accumulation_dtype(q_BNAE.dtype)
    scores_BANL = torch.einsum("bnae,blae->banl", q_BNAE.to(dtype), k_BLAE.to(dtype))
    return scores_BANL * q_BNAE.shape[-1] ** -0.5
