"""Random numbers that belong to a sample, not to a process.

Every draw is a pure function of (seed, epoch, sample id, stream, position): a counter-based
generator (Philox4x32-10) instead of a state that advances. One GPU, eight, a resumed run and a
sharded tensor that draws only its own slice therefore all see the same numbers.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MAX_EPOCH = 1 << 24
# Four would do for large pools, but favour some orders of five items fourfold.
_FEISTEL_ROUNDS = 8


class Stream(IntEnum):
    """What a draw is for: different streams of one sample are independent.

    One stream serves one kind of draw: `uniform` and `normal` of the same stream share their bits.
    """

    ORDER = 0  # `permuted` alone draws from it, with counters of its own
    BUCKET = 1
    TIMESTEP = 2
    NOISE = 3
    POSTERIOR = 4
    CAPTION_DROPOUT = 5
    CROP_TIME = 6
    CROP_SPACE = 7
    FLIP = 8
    REPLACEMENT = 9
    SAMPLER = 10


@dataclass(frozen=True)
class SampleKeys:
    """Names the samples of a batch for drawing: an (epoch, sample id) pair each, under one seed."""

    seed: int
    epochs_B: Tensor  # int64, below 2**24
    sample_ids_B: Tensor  # int64, non-negative

    @classmethod
    def single(cls, seed: int, *, epoch: int = 0, sample_id: int = 0) -> SampleKeys:
        """Keys of one sample on the CPU."""
        assert 0 <= epoch < _MAX_EPOCH, f"epoch={epoch} must be in [0, {_MAX_EPOCH})"
        return cls(seed, torch.tensor([epoch]), torch.tensor([sample_id]))

    def to(self, device: torch.device | str) -> SampleKeys:
        """The same keys on another device; the copy does not wait for it."""
        return SampleKeys(
            self.seed,
            self.epochs_B.to(device, non_blocking=True),
            self.sample_ids_B.to(device, non_blocking=True),
        )


def uniform(
    keys: SampleKeys, stream: Stream, shape: tuple[int, ...] = (), *, offset: int = 0
) -> Tensor:
    """Uniform numbers in [0, 1), float32 (B, *shape), on the device of the keys.

    Element i of a sample (row-major) is draw number `offset + i`, so a shard of a flat tensor can
    be drawn alone. All 24 mantissa bits are random.
    """
    bits = _bits(keys, stream, math.prod(shape), offset)
    return ((bits >> 8).float() * 2.0**-24).view(len(bits), *shape)


def normal(
    keys: SampleKeys, stream: Stream, shape: tuple[int, ...] = (), *, offset: int = 0
) -> Tensor:
    """Standard normal numbers, float32 (B, *shape), on the device of the keys.

    Box-Muller on consecutive pairs of draws: the integers are the same everywhere, the logarithm
    and the cosine agree between devices to their last bits. 24-bit uniforms end the tails at 5.77.
    """
    count = math.prod(shape)
    first = offset // 2 * 2
    last = (offset + count + 1) // 2 * 2
    bits = _bits(keys, stream, last - first, first).unflatten(1, ((last - first) // 2, 2))
    # (0, 1]: the logarithm must not see zero.
    radius = ((bits[..., 0] >> 8).float() + 1).mul(2.0**-24).log_().mul_(-2).sqrt_()
    angle = (bits[..., 1] >> 8).float() * (2.0**-24 * 2 * math.pi)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    start = offset - first
    return pairs.flatten(1)[:, start : start + count].reshape(len(bits), *shape)


def permuted(index: int, count: int, *, seed: int, epoch: int, domain: int = 0) -> int:
    """Where position `index` of an epoch lands in a random permutation of `count` items.

    A Feistel network with cycle walking: any position of a shuffle of any length costs the same and
    nothing is stored, so resuming in the middle of ten million samples is immediate. `domain`
    separates the permutations of several pools.
    """
    assert 0 <= index < count, f"index={index} must be in [0, {count})"
    assert 0 <= epoch < _MAX_EPOCH, f"epoch={epoch} must be in [0, {_MAX_EPOCH})"
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    value = index
    while True:
        left, right = value >> half_bits, value & mask
        for step in range(_FEISTEL_ROUNDS):
            counter = (right, epoch << 8 | Stream.ORDER, domain << 3 | step, 0)
            left, right = right, left ^ (philox_4x32(counter, _key(seed))[0] & mask)
        value = left << half_bits | right
        if value < count:
            return value


def named_seed(seed: int, name: str) -> int:
    """A 63-bit seed for a `torch.Generator`, a pure function of the run seed and a name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def philox_4x32(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 on plain integers: four 32-bit words from a counter of four, a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _key(seed: int) -> tuple[int, int]:
    return seed & _MASK, (seed >> 32) & _MASK


def _bits(keys: SampleKeys, stream: Stream, count: int, offset: int) -> Tensor:
    """Random 32-bit words as int64 (B, count), draws offset .. offset + count of a stream."""
    first_block, last_block = offset // 4, -(-(offset + count) // 4)
    start = offset - first_block * 4
    device = keys.sample_ids_B.device
    if device.type == "cuda":
        # Not at the top: loader workers draw as well, and need not wait for Triton's import.
        from longtake.ops.kernels import elementwise
        from longtake.ops.philox import philox_words

        if elementwise(keys.sample_ids_B) == "triton":
            words = philox_words(
                keys.epochs_B,
                keys.sample_ids_B,
                seed=keys.seed,
                stream=int(stream),
                first_block=first_block,
                num_blocks=last_block - first_block,
            )
            return words[:, start : start + count]
    block = torch.arange(first_block, last_block, device=device)[None]
    c0 = block & _MASK
    # Epoch (24 bits) and stream (8 bits) share the second word; the sample id fills the last two.
    c1 = (keys.epochs_B[:, None] << 8 | int(stream)) + torch.zeros_like(c0)
    c2 = (keys.sample_ids_B[:, None] & _MASK) + torch.zeros_like(c0)
    c3 = (keys.sample_ids_B[:, None] >> 32 & _MASK) + torch.zeros_like(c0)
    c0 = c0 + torch.zeros_like(c1)
    k0, k1 = _key(keys.seed)
    for _ in range(_ROUNDS):
        # int64 products wrap, which keeps their low 64 bits; the masked shift yields the high word.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32 & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    words = torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)
    return words[:, start : start + count]
