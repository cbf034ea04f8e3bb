"""The inputs of blocks, in host memory between the forward and the backward.

With blocks checkpointed, a block's input is all that its backward needs, once in the forward and
once in the backward: it can travel while other blocks compute. It leaves when the next block's
input exists, and is fetched back while the block behind it computes its gradients, so that a GPU
holds two of them, whatever the depth.

    compute     block 0   block 1   block 2   block 3 │ block 3   block 2   block 1   block 0
    copy                  x0 out    x1 out            │           x1 in     x0 in

The last inputs may stay, as many as the GPU has memory for: they are needed first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# Pinned memory is given out in powers of two: whole pieces waste less of it than whole tensors.
_PIECE_BYTES = 2**26


class StreamOffload:
    """Takes what a model's blocks keep of their residual stream to the host, and back."""

    def __init__(self) -> None:
        self._newest: _Input | None = None
        self._copies: torch.cuda.Stream | None = None

    def around(
        self, block: Callable[..., Tensor], *, is_first: bool, stays: bool = False
    ) -> Callable[..., Tensor]:
        """A checkpointed block whose input goes to the host, or stays."""
        return partial(self._run, block, is_first, stays)

    def _run(
        self,
        block: Callable[..., Tensor],
        is_first: bool,
        stays: bool,
        x_BND: Tensor,
        *rest: Tensor | None,
    ) -> Tensor:
        if is_first:
            self._newest = None  # of a forward that had no backward
        if x_BND.is_cuda and self._copies is None:
            self._copies = torch.cuda.Stream(x_BND.device)

        # Its place and not the stream itself: autograd keeps this function for as long as what it
        # gave, and with the function all that it refers to.
        place = x_BND.data_ptr()

        def leave(tensor: Tensor) -> Tensor | _Input:
            # What a block is given beside the stream is small. Tensors are saved as others that
            # share their memory.
            if tensor.data_ptr() != place:
                return tensor
            self._newest = _Input(tensor, self._newest, self._copies, stays=stays)
            return self._newest

        def return_(kept: Tensor | _Input) -> Tensor:
            return kept if isinstance(kept, Tensor) else kept.take()

        with saved_tensors_hooks(leave, return_):
            return block(x_BND, *rest)


class _Input:
    """One block's input, on the device, in host memory, or on its way."""

    def __init__(
        self, x: Tensor, before: _Input | None, copies: torch.cuda.Stream | None, *, stays: bool
    ) -> None:
        self._x: Tensor | None = x.detach()
        self._stays = stays
        self._shape, self._dtype, self._device = x.shape, x.dtype, x.device
        self._before, self._copies = before, copies
        self._host: list[Tensor] = []
        self._done: torch.cuda.Event | None = None
        if before is not None:
            before._send()
            if before._before is not None:
                before._before._let_go()

    def take(self) -> Tensor:
        """The tensor on its device again; the one of the block before begins to come."""
        self._fetch()
        x, self._x = self._x, None
        assert x is not None
        self._wait()
        self._host = []
        if self._before is not None:
            self._before._fetch()
        return x

    def _send(self) -> None:
        """Begins to copy it to the host."""
        if self._stays:
            return
        assert self._x is not None
        self._x = self._x.contiguous()
        with self._copying():
            for piece in self._pieces(self._x):
                host = torch.empty(
                    _PIECE_BYTES // piece.element_size(),
                    dtype=piece.dtype,
                    pin_memory=piece.is_cuda,
                )[: len(piece)]
                self._host.append(host.copy_(piece, non_blocking=True))

    def _let_go(self) -> None:
        """Frees the memory on the device: what uses it next waits for the copy."""
        if not self._stays:
            self._wait()
            self._x = None

    def _fetch(self) -> None:
        """Begins to copy it back, if it is not there."""
        if self._x is not None:
            return
        self._x = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        with self._copying():
            for piece, host in zip(self._pieces(self._x), self._host, strict=True):
                piece.copy_(host, non_blocking=True)

    def _pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.view(-1).split(_PIECE_BYTES // x.element_size())

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """On the stream for copies, behind all that computes until now."""
        if self._copies is None:
            yield
            return
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            yield
            self._done = torch.cuda.Event()
            self._done.record(self._copies)

    def _wait(self) -> None:
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
