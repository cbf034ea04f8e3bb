"""How tokens move between the processes of a sequence-parallel group, forward and backward.

Every movement gives the same on all processes of the group as one process would have, whatever the
sizes: what does not divide is filled up with zeros before it travels and cut off on arrival, so
that attention never meets a token that does not exist, and needs no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The operations behind PyTorch's functional collectives: alike in all supported versions, where the
# functions around them were renamed, and what a compiled graph holds.
_ops = torch.ops._c10d_functional


@dataclass(frozen=True)
class TokenGroup:
    """The processes that share the tokens of one sample, as one of them sees it."""

    name: str
    """Of the process group, by which collectives find it."""
    size: int
    rank: int
    timeout: timedelta
    """How long its collectives may wait, and those of groups within it."""

    def share(self, length: int) -> int:
        """What each process holds of so many rows, fillers included."""
        return -(-length // self.size)

    def own_rows(self, x: Tensor) -> Tensor:
        """This process's share of the rows of a tensor that all have, filled up with zeros."""
        return own_part(x, self, 0)


def own_part(x: Tensor, group: TokenGroup, dim: int) -> Tensor:
    """This process's rows of a tensor that all processes of the group have; contiguous.

        all have      0 1 2 3 4        rank 0   0 1 2
                                       rank 1   3 4 .

    Nothing travels. A copy, so that the whole is not kept alive by its part. The gradient is zero
    outside of the part: gradients of what comes before add up over the group.
    """
    share = group.share(x.shape[dim])
    part = _filled(x, dim, share * group.size).narrow(dim, group.rank * share, share)
    return part.clone(memory_format=torch.contiguous_format)


def gather_parts(x: Tensor, group: TokenGroup, dim: int, length: int) -> Tensor:
    """All rows, on every process of the group, from the part that each has: `own_part` undone.

        rank 0   0 1 2                all have      0 1 2 3 4
        rank 1   3 4 .

    An all-gather forward, nothing backward. All processes of the group must go on to compute the
    same loss; the gradient of a part is then that of its rows, times the size of the group: the
    mean over all processes, by which gradients are reduced, divides by it again.
    """
    gathered: Tensor = _Gather.apply(x, group.name, group.size, group.rank, dim, length)
    return gathered


@torch.no_grad()
def gather_rows(x: Tensor, group: TokenGroup, *, length: int) -> Tensor:
    """All rows from the share that each process has (`TokenGroup.own_rows`); without gradient."""
    parts = _ops.all_gather_into_tensor(x.contiguous(), group.size, group.name)
    return _ops.wait_tensor(parts)[:length]


def exchange(
    x: Tensor, group: TokenGroup, *, scatter_dim: int, gather_dim: int, length: int
) -> Tensor:
    """Shards of one dimension for shards of another: one all-to-all forward, one backward.

    Each process has its part of the rows along gather_dim, all along scatter_dim, and gets its part
    along scatter_dim with all `length` rows along gather_dim; contiguous.

                    scatter_dim                             scatter_dim
                    a   b   c                               a   b     c   .
                  ┌─────────────┐                         ┌────────┬────────┐
        rank 0  0 │ a0  b0  c0  │                       0 │ a0  b0 │ c0  .  │
                1 │ a1  b1  c1  │     →    gather_dim   1 │ a1  b1 │ c1  .  │
                  ├─────────────┤                       2 │ a2  b2 │ c2  .  │
        rank 1  2 │ a2  b2  c2  │                         └────────┴────────┘
                . │ .   .   .   │                           rank 0   rank 1
                  └─────────────┘

    A buffer of one part travels, less the share of it that stays. The transposed movement is the
    same with the dimensions swapped, and that is the gradient.
    """
    return start_exchange(x, group, scatter_dim=scatter_dim, gather_dim=gather_dim, length=length)()


def start_exchange(
    x: Tensor, group: TokenGroup, *, scatter_dim: int, gather_dim: int, length: int
) -> Callable[[], Tensor]:
    """Begins an `exchange`; what it returns waits for the result.

    What is computed in between does not wait. In the backward, which goes the other way round, the
    gradient sets out when the result's is known, and is waited for when that of x is needed.
    """
    where = group.name, group.size, scatter_dim, gather_dim
    travelling = _Send.apply(x, *where)

    def finish() -> Tensor:
        exchanged: Tensor = _Arrive.apply(travelling, *where, length)
        return exchanged

    return finish


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, name: str, size: int, rank: int, dim: int, length: int
    ) -> Tensor:
        ctx.size, ctx.rank, ctx.dim, ctx.share = size, rank, dim, x.shape[dim]
        parts = _ops.all_gather_into_tensor(x.contiguous(), size, name)
        parts = _ops.wait_tensor(parts).unflatten(0, (size, -1))
        return parts.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, length).contiguous()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        whole = _filled(dx, ctx.dim, ctx.share * ctx.size)
        part = whole.narrow(ctx.dim, ctx.rank * ctx.share, ctx.share)
        return part * ctx.size, None, None, None, None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, name: str, size: int, scatter_dim: int, gather_dim: int
    ) -> Tensor:
        ctx.scatter_dim, ctx.length = scatter_dim, x.shape[scatter_dim]
        return _sent(x, name, size, scatter_dim)

    @staticmethod
    def backward(ctx: Any, dparts: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return _arrived(dparts, ctx.scatter_dim, ctx.length), None, None, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        parts: Tensor,
        name: str,
        size: int,
        scatter_dim: int,
        gather_dim: int,
        length: int,
    ) -> Tensor:
        ctx.back = name, size, gather_dim
        return _arrived(parts, gather_dim, length)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return _sent(dx, *ctx.back), None, None, None, None, None


def _sent(x: Tensor, name: str, size: int, scatter_dim: int) -> Tensor:
    """Parts by receiver, on their way: nobody may read them before `_arrived`."""
    share = -(-x.shape[scatter_dim] // size)
    x = _filled(x, scatter_dim, share * size)
    parts = x.unflatten(scatter_dim, (size, share)).movedim(scatter_dim, 0).contiguous()
    counts = [1] * size
    return _ops.all_to_all_single(parts, counts, counts, name)


def _arrived(parts: Tensor, gather_dim: int, length: int) -> Tensor:
    """Parts by sender, one behind the other along gather_dim."""
    x = _ops.wait_tensor(parts).movedim(0, gather_dim).flatten(gather_dim, gather_dim + 1)
    # A copy also where all lies in order already: on PyTorch 2.11 compiled gradients that pass
    # through a view of what arrived are an error or, worse, wrong.
    return x.narrow(gather_dim, 0, length).clone(memory_format=torch.contiguous_format)


def _filled(x: Tensor, dim: int, length: int) -> Tensor:
    """Zeros behind the rows along `dim`, up to a length."""
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim % x.ndim) + (0, missing))
