"""Encoding ahead: the next micro-batch is encoded on a second stream while this one is trained.

            side stream:   encode 0 | encode 1 | encode 2 | ...
    the model's stream:             | train 0  | train 1  | ...

The host asks for batch n + 1 and begins to encode it, then trains batch n. Neither waits for the
device; the streams wait for each other:

- Encoding n + 1 begins when all that the model's stream had been given before is done, which is
  the training of n - 1. It therefore sees weights and tables that were made there, runs at most one
  micro-batch ahead, and may take memory of the side stream that training n - 1 read last.
- Training n begins when n is encoded.

That order alone makes it safe to free tensors of one stream that the other has read: whoever gets
their memory next comes after. Nothing is recorded per tensor, so the allocator never has to hold
memory back.

Nothing else moves: a batch that was begun counts as consumed only when it is handed out, and what
goes wrong while one is begun is raised in its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Generic, TypeVar

import torch

from longtake.data import BadSample, Loader, LoaderState
from longtake.pipeline.inputs import Inputs

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class EncodedStep:
    """The micro-batches of one optimizer step, and where the loader stands once it is trained."""

    micro_batches: Iterator[Inputs]
    """Each is encoded, or has been begun, when it is asked for; all of them must be."""
    num_micro_batches: int
    bucket: int
    place: LoaderState
    bad: list[BadSample]
    """What this process could not read up to here."""


def encoded_steps(
    loader: Loader,
    encode: Callable[[Any], Inputs],
    *,
    num_steps: int,
    device: torch.device,
    ahead: bool,
) -> Iterator[EncodedStep]:
    """The loader's next steps, encoded in order; `ahead` looks one micro-batch further.

    Not beyond the last: no more steps are asked of the loader than are to be trained.
    """

    def encode_one(fetched: _Fetched) -> tuple[_Fetched, Inputs]:
        return fetched, encode(fetched.batch)

    encoded = in_turn(encode_one, _fetch(loader, num_steps), device=device, ahead=ahead)
    for fetched, first in encoded:
        rest = (inputs for _, inputs in islice(encoded, fetched.step_length - 1))
        yield EncodedStep(
            micro_batches=chain([first], rest),
            num_micro_batches=fetched.step_length,
            bucket=fetched.batch.bucket,
            place=fetched.place,
            bad=fetched.bad,
        )


@dataclass(frozen=True)
class _Fetched:
    """A micro-batch, and what the loader said when it gave out its step."""

    batch: Any
    step_length: int
    place: LoaderState
    bad: list[BadSample]


def _fetch(loader: Loader, num_steps: int) -> Iterator[_Fetched]:
    for micro_batches in islice(loader, num_steps):
        place, bad = loader.state, loader.bad
        for batch in micro_batches:
            yield _Fetched(batch, len(micro_batches), place, bad)


def in_turn(
    make: Callable[[_Item], _Made],
    items: Iterable[_Item],
    *,
    device: torch.device,
    ahead: bool,
) -> Iterator[_Made]:
    """`make` of every item. `ahead` begins each before the one before it is handed out: on CUDA on
    a stream of its own, elsewhere at once.

    Raises: what `make` or the items raise, when the item's turn has come.
    """
    if not ahead:
        yield from map(make, items)
        return
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    source = iter(items)
    begun = _begin(make, source, stream)
    while begun is not None:
        following = None if begun.error else _begin(make, source, stream)
        yield begun.hand_out()
        begun = following


@dataclass(frozen=True)
class _Begun(Generic[_Made]):
    """Something that is being made on a side stream, or why it could not be."""

    made: _Made | None = None
    done: torch.cuda.Event | None = None
    error: Exception | None = None

    def hand_out(self) -> Any:
        """To the current stream, which from here on waits until it is made."""
        if self.error is not None:
            raise self.error
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)
        return self.made


def _begin(
    make: Callable[[_Item], _Made], source: Iterator[_Item], stream: torch.cuda.Stream | None
) -> _Begun[_Made] | None:
    """Begins with the next item; None if there is none."""
    try:
        for item in source:
            if stream is None:
                return _Begun(made=make(item))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                made = make(item)
            done = torch.cuda.Event()
            done.record(stream)
            return _Begun(made=made, done=done)
    except Exception as error:
        return _Begun(error=error)
    return None
