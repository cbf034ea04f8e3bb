"""Branches of a block run piece by piece, and computed again in the backward: what a long video's
MLP and attention hold at a time is a piece's, not the sample's.

What a branch's tokens see says where it may be cut: an MLP and cross-attention anywhere, spatial
attention between frames, temporal attention between places, full attention nowhere. Gradients of
weights and of whatever the pieces share are summed over the pieces in float32.

A branch keeps its inputs and, where it attends to many keys, what attention found: that costs a
tensor of tokens and spares the most of computing it again (longtake.ops.attended). In a block that
is checkpointed none of it outlives the branch until the block is computed again.

Letters: B batch, T frames, S spatial patches, N tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from longtake.models.layers import (
    CrossAttention,
    GatedMlp,
    SelfAttention,
    SpatialAttention,
    TemporalAttention,
)
from longtake.ops.attended import giving_attended, keeping_attended

Pieces = Literal["all", "pointwise"]
"""Which branches: all, or those whose tokens do not see each other, the MLP and attention to text.
"""

PIECE_TOKENS = 2**16
"""The most tokens of a piece. A product of so many rows has long been at full speed, and a piece of
an XL's MLP, forward and backward, holds less than 3 GiB in bf16."""


def branches_of(block: nn.Module) -> list[nn.Module]:
    """The branches of a block, each a function of the residual stream and a few small tensors."""
    kinds = (SelfAttention, CrossAttention, GatedMlp)
    return [module for module in block.modules() if isinstance(module, kinds)]


def is_in_pieces(branch: nn.Module, pieces: Pieces) -> bool:
    """Whether the branch is one of those that run in pieces."""
    return pieces == "all" or not isinstance(branch, SelfAttention)


def run_in_pieces(branch: nn.Module) -> None:
    """Makes a branch keep its inputs, what long attention found, and the tensors of one piece at a
    time, in place.

    The forward of the instance is wrapped: hooks on the module, which exchange tokens between
    processes, see the whole stream.
    """
    branch.forward = partial(_run, branch, branch.forward, _cut_dim(branch))


def _cut_dim(branch: nn.Module) -> int | None:
    """The dimension of x_BTSD or x_BND along which pieces do not see each other."""
    if not isinstance(branch, SelfAttention) or isinstance(branch.core, SpatialAttention):
        return 1
    return 2 if isinstance(branch.core, TemporalAttention) else None


def _run(
    branch: nn.Module,
    forward: Callable[..., Tensor],
    dim: int | None,
    x_BND: Tensor,
    *rest: Tensor | None,
) -> Tensor:
    pieces = _pieces(x_BND, dim)
    if not torch.is_grad_enabled():
        return _joined(lambda piece: forward(_part(x_BND, piece), *rest), x_BND, pieces)
    # Read anew at every call: FSDP gives a module other parameters while they are gathered.
    params = tuple(branch.parameters())
    if not any(t is not None and t.requires_grad for t in (x_BND, *rest)):
        # All before is frozen. Else there were no graph in which the inputs are saved.
        x_BND = x_BND.detach().requires_grad_()
    inputs = _Inputs.apply(x_BND, *rest)
    # In a list, so that it is no input of the graph.
    return _InPieces.apply(forward, pieces, [inputs], len(rest), x_BND, *rest, *params)


@dataclass(frozen=True)
class _Piece:
    dim: int
    first: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        return x.narrow(self.dim, self.first, self.length)


def _pieces(x_BND: Tensor, dim: int | None) -> list[_Piece]:
    """All of x, in pieces of at most PIECE_TOKENS where rows have no more.

    Of equal size where a size between half of that and all divides the rows: each is compiled once.
    """
    if dim is None:
        return [_Piece(1, 0, x_BND.shape[1])]
    num_rows = x_BND.shape[dim]
    row_tokens = x_BND.numel() // (num_rows * x_BND.shape[-1])
    most = min(num_rows, max(1, PIECE_TOKENS // row_tokens))
    fitting = (length for length in range(most, most // 2, -1) if num_rows % length == 0)
    length = next(fitting, most)
    return [
        _Piece(dim, first, min(length, num_rows - first)) for first in range(0, num_rows, length)
    ]


def _part(x_BND: Tensor, piece: _Piece) -> Tensor:
    return piece.of(x_BND).contiguous()


def _joined(function: Callable[[_Piece], Tensor], x_BND: Tensor, pieces: list[_Piece]) -> Tensor:
    """What a function gives for each piece, as one tensor like x."""
    if len(pieces) == 1:
        return function(pieces[0])
    whole_BND = torch.empty_like(x_BND, memory_format=torch.contiguous_format)
    for piece in pieces:
        piece.of(whole_BND).copy_(function(piece))
    return whole_BND


class _Inputs(torch.autograd.Function):
    """Saves what a branch reads, before the branch runs.

    A function's tensors are saved when it is done. What computes a block again stops as soon as it
    has all that was saved: this way at the last branch's door, and not behind it.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        x_BND = inputs[0]
        assert x_BND is not None
        return x_BND.new_empty(0)


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Tensor],
        pieces: list[_Piece],
        inputs: list[Tensor],
        num_rest: int,
        x_BND: Tensor,
        *rest_and_params: Tensor | None,
    ) -> Tensor:
        # The tensor and not its node: in PyTorch 2.11 a node lives no longer than its tensors.
        ctx.run, ctx.pieces, (ctx.inputs,) = run, pieces, inputs
        rest, ctx.params = rest_and_params[:num_rest], rest_and_params[num_rest:]
        rest = tuple(map(_leaf, rest))

        attended: list[Tensor] = []

        def forward_of(piece: _Piece) -> Tensor:
            # With a graph that is dropped at once: so that forward and backward share a compiled
            # graph, and what is computed again is the same to the bit.
            with _own_graph(), keeping_attended(attended):
                return run(_part(x_BND, piece).detach().requires_grad_(), *rest).detach()

        out_BND = _joined(forward_of, x_BND, pieces)
        # Here and not in _Inputs: it exists now. No block ends with attention, and so none runs its
        # last branch again for this.
        ctx.save_for_backward(*attended)
        return out_BND

    @staticmethod
    def backward(ctx: Any, dout_BND: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x_BND, *rest = ctx.inputs.grad_fn.saved_tensors
        ctx.inputs = None  # no backward goes there to let go of them
        attended = list(ctx.saved_tensors)
        rest = list(map(_leaf, rest))
        shared = [t for t in (*rest, *ctx.params) if t is not None and t.requires_grad]
        sums: list[Tensor] = []

        def backward_of(piece: _Piece) -> Tensor:
            with _own_graph(), giving_attended(attended):
                x_part = _part(x_BND, piece).detach().requires_grad_()
                out_part = ctx.run(x_part, *rest)
            dout_part = _part(dout_BND, piece)
            dx_part, *gradients = torch.autograd.grad(out_part, (x_part, *shared), dout_part)
            _add(sums, gradients, is_only=len(ctx.pieces) == 1)
            return dx_part

        dx_BND = _joined(backward_of, x_BND, ctx.pieces)
        assert not attended, "a branch computed again attends as often as before"
        found = iter(t.to(like.dtype) for t, like in zip(sums, shared, strict=True))
        gradients = (
            next(found) if t is not None and t.requires_grad else None for t in (*rest, *ctx.params)
        )
        return None, None, None, None, dx_BND, *gradients


def _add(sums: list[Tensor], gradients: list[Tensor], *, is_only: bool) -> None:
    """Adds gradients of a piece to the sums over pieces, in at least float32."""
    if not sums:
        if is_only:
            sums.extend(gradients)
        else:
            sums.extend(
                t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in gradients
            )
        return
    for total, gradient in zip(sums, gradients, strict=True):
        total += gradient


def _leaf(tensor: Tensor | None) -> Tensor | None:
    """The tensor without its history, asking for a gradient if it did."""
    return None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)


@contextmanager
def _own_graph() -> Iterator[None]:
    """Records a graph whose tensors are its own: whoever counts or moves what is saved around it
    must not see them."""
    # Detached: a node that keeps its own output with its history keeps itself, for ever.
    with torch.enable_grad(), saved_tensors_hooks(torch.detach, lambda tensor: tensor):
        yield
