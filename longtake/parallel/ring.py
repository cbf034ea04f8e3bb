"""Ring attention: each process attends with its queries to the keys of all, which come by in turn.

A process holds a chunk of the tokens. Its keys and values travel around the ring, and what each
chunk of them gives is merged by log-sum-exp. Four processes; `k2` are keys and values of chunk 2:

                 step 0      step 1      step 2      step 3
        rank 0   q0 to k0    q0 to k3    q0 to k2    q0 to k1      each then passes its
        rank 1   q1 to k1    q1 to k0    q1 to k3    q1 to k2      keys and values on
        rank 2   q2 to k2    q2 to k1    q2 to k0    q2 to k3      to the next rank
        rank 3   q3 to k3    q3 to k2    q3 to k1    q3 to k0

The next chunk is on its way while the present one is computed with. In the backward keys and values
go around once more, and behind them the sums of their gradients, to which each process adds its
part: k0's set out on rank 1, and after rank 3's part they go home to rank 0, which adds its own.

Each direction is one operation to PyTorch, so that a compiled block holds it like any other.

Source: Liu et al., "Ring attention with blockwise transformers", arXiv:2310.01889.

Letters: B batch, N tokens of a chunk, fillers included, A heads, E size per head; 2 is k and v, 3
is q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from longtake.ops.operation import operation, register_autograd, register_fake
from longtake.ops.partial_attention import (
    accumulation_dtype,
    merge_part,
    partial_attention,
    partial_attention_backward,
    pick_partial_backend,
)
from longtake.parallel.exchange import TokenGroup


def ring_attention(qkv_BN3AE: Tensor, ring: TokenGroup, *, num_tokens: int) -> Tensor:
    """softmax(q k^T / sqrt(E)) v of this process's chunk of tokens to those of all chunks,
    (B, N, A, E), contiguous.

    Chunks are of the same size and follow each other by rank; from `num_tokens` on, rows are
    fillers. Nobody attends to those; what they themselves get means nothing.

    Raises: ValueError if the configuration insists on a kernel that cannot compute it.
    """
    _, N, _, _, E = qkv_BN3AE.shape
    backend = pick_partial_backend(
        keys=N, head_size=E, dtype=qkv_BN3AE.dtype, device=qkv_BN3AE.device
    )
    where = ring.name, ring.size, ring.rank
    return _ring_attention(qkv_BN3AE, num_tokens, *where, backend)[0]


@operation("longtake::ring_attention")
def _ring_attention(
    qkv_BN3AE: Tensor, num_tokens: int, name: str, size: int, rank: int, backend: str
) -> tuple[Tensor, Tensor]:
    """out (B, N, A, E) and, for the backward, the log-sum-exp of each row of scores (B, A, N)."""
    q_BNAE, kv_2BNAE = _queries_and_rest(qkv_BN3AE)
    out_BNAE, lse_BAN = None, None
    for _, keys_2BLAE in _go_around(kv_2BNAE, num_tokens, name, size, rank):
        if keys_2BLAE.shape[2] == 0:
            continue
        part_BNAE, part_lse_BAN = partial_attention(backend, q_BNAE, *keys_2BLAE)
        if out_BNAE is None or lse_BAN is None:
            out_BNAE, lse_BAN = part_BNAE.to(accumulation_dtype(part_BNAE.dtype)), part_lse_BAN
        else:
            merge_part(out_BNAE, lse_BAN, part_BNAE, part_lse_BAN)
    assert out_BNAE is not None, f"a ring with {num_tokens} tokens"
    assert lse_BAN is not None
    return out_BNAE.to(qkv_BN3AE.dtype), lse_BAN


@register_fake(_ring_attention)
def _(
    qkv_BN3AE: Tensor, num_tokens: int, name: str, size: int, rank: int, backend: str
) -> tuple[Tensor, Tensor]:
    B, N, _, A, E = qkv_BN3AE.shape
    lse_BAN = qkv_BN3AE.new_empty(B, A, N, dtype=accumulation_dtype(qkv_BN3AE.dtype))
    return qkv_BN3AE.new_empty(B, N, A, E), lse_BAN


@operation("longtake::ring_attention_backward")
def _ring_attention_backward(
    dout_BNAE: Tensor,  # zero in the rows of fillers
    qkv_BN3AE: Tensor,
    out_BNAE: Tensor,
    lse_BAN: Tensor,
    num_tokens: int,
    name: str,
    size: int,
    rank: int,
    backend: str,
) -> Tensor:
    """The gradient of qkv, (B, N, 3, A, E) and contiguous."""
    q_BNAE, kv_2BNAE = _queries_and_rest(qkv_BN3AE)
    dout_BNAE = dout_BNAE.contiguous()
    dq_BNAE = torch.zeros_like(q_BNAE, dtype=accumulation_dtype(q_BNAE.dtype))
    own_dkv_2BNAE, arrive = None, None
    for step, keys_2BLAE in _go_around(kv_2BNAE, num_tokens, name, size, rank):
        num_keys = keys_2BLAE.shape[2]
        dkv_2BNAE = torch.zeros_like(kv_2BNAE)
        if num_keys:
            k_BLAE, v_BLAE = keys_2BLAE.unbind(0)
            part_dq_BNAE, dk_BLAE, dv_BLAE = partial_attention_backward(
                backend, dout_BNAE, q_BNAE, k_BLAE, v_BLAE, out_BNAE, lse_BAN
            )
            dq_BNAE += part_dq_BNAE
            dkv_2BNAE[0, :, :num_keys], dkv_2BNAE[1, :, :num_keys] = dk_BLAE, dv_BLAE
        if step == 0:
            own_dkv_2BNAE = dkv_2BNAE
            continue
        # Sums travel in the dtype of the keys, in which each part of them is computed.
        if arrive is not None:
            dkv_2BNAE += arrive()
        arrive = _pass_on(dkv_2BNAE, name, size, rank)
    assert own_dkv_2BNAE is not None, f"a ring of {size}"
    assert arrive is not None, f"a ring of {size}"
    own_dkv_2BNAE += arrive()

    dqkv_BN3AE = qkv_BN3AE.new_empty(qkv_BN3AE.shape)
    dqkv_BN3AE[:, :, 0] = dq_BNAE
    dqkv_BN3AE[:, :, 1:] = own_dkv_2BNAE.movedim(0, 2)
    return dqkv_BN3AE


@register_fake(_ring_attention_backward)
def _(
    dout_BNAE: Tensor,
    qkv_BN3AE: Tensor,
    out_BNAE: Tensor,
    lse_BAN: Tensor,
    num_tokens: int,
    name: str,
    size: int,
    rank: int,
    backend: str,
) -> Tensor:
    return qkv_BN3AE.new_empty(qkv_BN3AE.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv_BN3AE, *ctx.ring = inputs
    ctx.save_for_backward(qkv_BN3AE, *output)
    # Else the unused gradient of the log-sum-exp would be filled with zeros at every call.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout_BNAE: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dqkv_BN3AE = _ring_attention_backward(dout_BNAE, *ctx.saved_tensors, *ctx.ring)
    return dqkv_BN3AE, *(None for _ in ctx.ring)


register_autograd(_ring_attention, _backward, setup_context=_save_for_backward)


def _queries_and_rest(qkv_BN3AE: Tensor) -> tuple[Tensor, Tensor]:
    """q, where it lies, and a copy of k and v as they travel, (2, B, N, A, E)."""
    return qkv_BN3AE[:, :, 0], qkv_BN3AE[:, :, 1:].movedim(2, 0).contiguous()


def _go_around(
    kv_2BNAE: Tensor, num_tokens: int, name: str, size: int, rank: int
) -> Iterator[tuple[int, Tensor]]:
    """Steps with the keys and values at hand, fillers cut off: first this process's own, then those
    of the ranks before it. The next ones travel while the caller computes."""
    chunk = kv_2BNAE.shape[2]
    for step in range(size):
        owner = (rank - step) % size
        num_keys = min(max(num_tokens - owner * chunk, 0), chunk)
        arrive = _pass_on(kv_2BNAE, name, size, rank) if step + 1 < size else None
        yield step, kv_2BNAE[:, :, :num_keys]
        if arrive is not None:
            kv_2BNAE = arrive()


def _pass_on(x: Tensor, name: str, size: int, rank: int) -> Callable[[], Tensor]:
    """Begins to send a tensor to the next process and to receive that of the one before; what it
    returns waits for both (on a GPU the stream does, not the host)."""
    group = c10d._resolve_process_group(name)  # pyright: ignore
    received = torch.empty_like(x)
    moves = [
        dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % size),
        dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size),
    ]
    works = dist.batch_isend_irecv(moves)

    def arrive() -> Tensor:
        for work in works:
            work.wait()
        moves.clear()  # until now they kept x, whose memory nobody else may have
        return received

    return arrive
