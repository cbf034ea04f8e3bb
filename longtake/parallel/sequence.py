"""Sequence parallelism: the tokens of a sample spread over a group of processes, from outside the
model.

The stream is split along its first dimension of tokens before the first block (T of x_BTSD, N of
x_BND) and gathered behind the final layer, where a token is a few values per patch instead of the
hidden size. In between, what a layer does is decided by which tokens its attention sees:

    spatial attention,        the patches of a frame,    nothing travels: frames are whole
    cross-attention, MLP      a caption; itself
    temporal attention        the frames at one place    the branch runs on a shard of places
    full attention            all tokens                 the core runs on a shard of heads (Ulysses)
                                                         and, where sp is more than divides them, on
                                                         keys that come by in a ring

Around the temporal branch the residual stream travels, once in and once out: 2 passes of the hidden
size per token. Around its core it would be 4: q, k and v in, what was attended to out. And within
the branch all frames are there, so that positions in time are those of one process without a word
to the model.

Source: Zhao et al., "DSP: dynamic sequence parallelism", arXiv:2403.10266; Jacobs et al.,
"DeepSpeed Ulysses", arXiv:2309.14509; Fang and Zhao, "USP: a unified sequence parallelism
approach", arXiv:2405.07719.

Letters: B batch, T frames, S spatial patches, N = T S tokens, D hidden size, A heads, E size per
head; 3 is q, k and v.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longtake.models.layers import (
    FullAttention,
    SelfAttention,
    SpatialAttention,
    TemporalAttention,
)
from longtake.models.positions import TemporalPositions
from longtake.parallel.exchange import TokenGroup, exchange, gather_parts, own_part, start_exchange
from longtake.parallel.mesh import divide_group
from longtake.parallel.ring import ring_attention


def split_sequence(model: nn.Module, group: TokenGroup, *, in_halves: bool = False) -> None:
    """Makes each process of the group compute its part of every sample's tokens, in place. All
    processes of the run must call it together, each for its group.

    The model is then called as before, by all processes of the group with the same inputs, and
    gives all of them the whole prediction. Parameter names stay. Averaged over all processes,
    gradients are those of one process.

    in_halves: temporal branches compute with one half of the places while the other travels.
    """
    blocks, final_layer = model.blocks, model.final_layer
    assert isinstance(blocks, nn.ModuleList), "a model's blocks are where tokens are split"
    assert isinstance(final_layer, nn.Module), "a model's final layer is where they are gathered"
    stream = _Stream(group, in_halves=in_halves)
    divide = functools.cache(functools.partial(divide_group, group))
    for module in list(model.modules()):
        if isinstance(module, SelfAttention):
            _spread(module, stream, divide)
        elif isinstance(module, TemporalPositions):
            module.register_forward_hook(stream.take_own_frames)
    blocks[0].register_forward_pre_hook(stream.split)
    final_layer.register_forward_hook(stream.gather)


def _spread(
    attention: SelfAttention,
    stream: _Stream,
    divide: Callable[[int], tuple[TokenGroup | None, TokenGroup | None]],
) -> None:
    """What an attention needs so that its tokens see those of other processes."""
    core = attention.core
    if isinstance(core, TemporalAttention):
        _spread_places(attention, stream)
    elif isinstance(core, FullAttention):
        by_heads, in_ring = divide(attention.num_heads)
        if in_ring is not None:
            attention.core = RingAttention(in_ring, stream)
        if by_heads is not None:
            attention.core = UlyssesAttention(attention.core, by_heads, stream)
    else:
        assert isinstance(core, SpatialAttention), f"which tokens does {type(core).__name__} see?"


def _spread_places(attention: SelfAttention, stream: _Stream) -> None:
    """Makes a temporal branch run on a part of the places, under the same parameter names.

    By another class and not by another forward of the instance: to the compiler, functions of
    instances differ, and each block would be a graph of its own.
    """
    spread: Any = attention
    inner = vars(attention).pop("forward", None)
    spread.__class__ = _class_on_places(type(attention))
    spread.stream = stream
    if inner is not None:  # compiled, or in pieces: tokens travel around it
        spread.on_own_places = inner


@functools.cache
def _class_on_places(kind: type[SelfAttention]) -> type[SelfAttention]:
    def forward(self: Any, x_BTSD: Tensor, *rows: Tensor) -> Tensor:
        return self.stream.on_places(self.on_own_places, x_BTSD, *rows)

    members = {"forward": forward, "on_own_places": kind.forward}
    return type(f"{kind.__name__}OnPlaces", (kind,), members)


class UlyssesAttention(nn.Module):
    """A core on all tokens of a group and a part of the heads, for tokens and heads the other way
    round."""

    def __init__(self, core: nn.Module, group: TokenGroup, stream: _Stream) -> None:
        super().__init__()
        self.core = core
        self.group = group
        self.stream = stream

    def forward(self, qkv_BN3AE: Tensor) -> Tensor:
        group, (num_tokens,) = self.group, self.stream.sizes
        share, num_heads = qkv_BN3AE.shape[1], qkv_BN3AE.shape[3]
        # A group that has only a part of all tokens keeps fillers: its ring wants equal chunks.
        length = min(num_tokens, share * group.size)
        qkv_BN3AE = exchange(qkv_BN3AE, group, scatter_dim=3, gather_dim=1, length=length)
        out_BNAE = self.core(qkv_BN3AE)
        return exchange(out_BNAE, group, scatter_dim=1, gather_dim=2, length=num_heads)


class RingAttention(nn.Module):
    """A core on a chunk of the tokens, which sees those of the other chunks as they come by."""

    def __init__(self, group: TokenGroup, stream: _Stream) -> None:
        super().__init__()
        self.group = group
        self.stream = stream

    def forward(self, qkv_BN3AE: Tensor) -> Tensor:
        (num_tokens,) = self.stream.sizes
        return ring_attention(qkv_BN3AE, self.group, num_tokens=num_tokens)


class _Stream:
    """A model's residual stream while it is spread over a group, as the hooks that move it."""

    def __init__(self, group: TokenGroup, *, in_halves: bool) -> None:
        self.group = group
        self.in_halves = in_halves
        self.sizes: tuple[int, ...] = ()
        """Of the whole stream, (T, S) or (N,): a part of it does not tell. Noted at every split; a
        backward that computes a block again comes before the next."""

    def split(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the first block, whose first argument is the stream."""
        x_BND = args[0]
        self.sizes = tuple(x_BND.shape[1:-1])
        return own_part(x_BND, self.group, dim=1), *args[1:]

    def gather(self, layer: nn.Module, args: tuple[Any, ...], patches_BNP: Tensor) -> Tensor:
        """Behind the final layer: (B, N, P), or (B, T, S, P); N is in the order (T, S)."""
        length = self.sizes[0]
        rows_per_length = patches_BNP.shape[1] // self.group.share(length)
        return gather_parts(patches_BNP, self.group, dim=1, length=length * rows_per_length)

    def on_places(self, branch: Callable[..., Tensor], x_BTSD: Tensor, *rows: Tensor) -> Tensor:
        """A temporal branch: from some frames of all places to all frames of some, and back."""
        num_frames, num_places = self.sizes
        sizes = self._places_of_parts(num_places)
        arriving = [
            start_exchange(part, self.group, scatter_dim=2, gather_dim=1, length=num_frames)
            for part in x_BTSD.split(sizes, dim=2)
        ]
        # Handed on, and not held here: each is a part of all tokens.
        leaving = [
            start_exchange(
                branch(arriving.pop(0)(), *rows),
                self.group,
                scatter_dim=1,
                gather_dim=2,
                length=places,
            )
            for places in sizes
        ]
        returned = [leaving.pop(0)() for _ in sizes]
        return returned[0] if len(returned) == 1 else torch.cat(returned, dim=2)

    def _places_of_parts(self, num_places: int) -> list[int]:
        """Those of the first are a multiple of the group's size, so that no fillers are added."""
        first = -(-self.group.share(num_places) // 2) * self.group.size
        if not self.in_halves or first >= num_places:
            return [num_places]
        return [first, num_places - first]

    def take_own_frames(
        self, positions: nn.Module, args: tuple[Any, ...], time_TD: Tensor
    ) -> Tensor:
        """Behind a table of positions in time that is added to the split stream."""
        return own_part(time_TD, self.group, dim=0)
