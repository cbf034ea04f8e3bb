import itertools
import math
from collections import Counter

import pytest
import torch

from longtake.randomness import (
    SampleKeys,
    Stream,
    named_seed,
    normal,
    permuted,
    philox_4x32,
    uniform,
)

KEYS = SampleKeys(
    seed=0x0123_4567_89AB_CDEF,
    epochs_B=torch.tensor([0, 7, 7]),
    sample_ids_B=torch.tensor([3, 3, 2**40 + 5]),
)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)  # fmt: skip
def test_philox_gives_the_authors_known_answers(counter, key, expected):
    def words(text):
        return tuple(int(word, 16) for word in text.split())

    assert philox_4x32(words(counter), words(key)) == words(expected)


def test_tensors_and_plain_integers_agree():
    bits = (uniform(KEYS, Stream.NOISE, (11,), offset=6).double() * 2**24).long()
    key = (KEYS.seed & 0xFFFFFFFF, KEYS.seed >> 32)
    for row, (epoch, sample_id) in enumerate(
        zip(KEYS.epochs_B.tolist(), KEYS.sample_ids_B.tolist(), strict=True)
    ):
        second = epoch << 8 | Stream.NOISE
        low, high = sample_id & 0xFFFFFFFF, sample_id >> 32
        for column in range(11):
            block, word = divmod(6 + column, 4)
            expected = philox_4x32((block, second, low, high), key)[word] >> 8
            assert bits[row, column] == expected


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize(("offset", "count"), [(0, 1), (1, 1), (3, 8), (5, 9), (31, 1), (8, 0)])
def test_slices_equal_the_whole(draw, offset, count):
    whole = draw(KEYS, Stream.NOISE, (32,))
    part = draw(KEYS, Stream.NOISE, (count,), offset=offset)
    assert torch.equal(part, whole[:, offset : offset + count])


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_sample_draws_the_same_alone_and_in_any_batch(draw):
    together = draw(KEYS, Stream.CROP_SPACE, (2, 3))
    for row in range(3):
        alone = SampleKeys(
            KEYS.seed, KEYS.epochs_B[row : row + 1], KEYS.sample_ids_B[row : row + 1]
        )
        assert torch.equal(draw(alone, Stream.CROP_SPACE, (2, 3))[0], together[row])


@pytest.mark.parametrize("draw", [uniform, normal])
def test_shapes_and_dtype(draw):
    assert draw(KEYS, Stream.NOISE).shape == (3,)
    assert draw(KEYS, Stream.NOISE, (2, 5)).shape == (3, 2, 5)
    assert draw(KEYS, Stream.NOISE, (2, 0)).shape == (3, 2, 0)
    assert draw(KEYS, Stream.NOISE).dtype == torch.float32
    nobody = SampleKeys(0, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    assert draw(nobody, Stream.NOISE, (2, 5)).shape == (0, 2, 5)


def test_seed_epoch_sample_and_stream_each_change_everything():
    def draw(seed=1, epoch=2, sample_id=3, stream=Stream.NOISE):
        keys = SampleKeys.single(seed, epoch=epoch, sample_id=sample_id)
        return uniform(keys, stream, (4096,))[0]

    draws = [
        draw(),
        draw(seed=2),
        draw(seed=1 + 2**32),
        draw(epoch=3),
        draw(sample_id=4),
        draw(sample_id=3 + 2**32),
        *(draw(stream=stream) for stream in Stream if stream != Stream.NOISE),
    ]
    for one, other in itertools.combinations(draws, 2):
        # 24-bit numbers: a chance coincidence in 4096 positions has a probability of 2e-4.
        assert (one == other).sum() <= 1
        correlation = torch.corrcoef(torch.stack((one, other)))[0, 1]
        assert correlation.abs() < 5 / math.sqrt(4096)


def test_single_keys_reject_an_epoch_that_does_not_fit():
    with pytest.raises(AssertionError, match="epoch=16777216 must be in"):
        SampleKeys.single(0, epoch=2**24)


def kolmogorov_smirnov(cumulative):
    """Largest distance from uniform times sqrt(count): above 1.95 in 0.1 % of cases."""
    ranks = torch.arange(len(cumulative) + 1, dtype=torch.float64) / len(cumulative)
    cumulative = cumulative.sort().values
    distance = torch.maximum(ranks[1:] - cumulative, cumulative - ranks[:-1]).max()
    return distance * math.sqrt(len(cumulative))


def test_uniform_is_uniform_and_below_one():
    numbers = uniform(KEYS, Stream.TIMESTEP, (100_000,)).flatten()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert kolmogorov_smirnov(numbers.double()) < 1.95
    serial = torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1]
    assert serial.abs() < 5 / math.sqrt(len(numbers))


def test_normal_is_normal():
    numbers = normal(KEYS, Stream.NOISE, (100_000,)).flatten().double()
    count = len(numbers)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        moment = numbers.pow(power).mean()
        assert abs(moment - expected) < 4 * math.sqrt(variance / count), power
    assert kolmogorov_smirnov(torch.special.ndtr(numbers)) < 1.95
    # The two halves of a Box-Muller pair share a radius; their squares must not be correlated.
    pairs = numbers.view(-1, 2).square()
    assert torch.corrcoef(pairs.T)[0, 1].abs() < 5 / math.sqrt(count / 2)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 63, 64, 65, 1000])
def test_permuted_is_a_bijection(count):
    landed = [permuted(index, count, seed=3, epoch=1) for index in range(count)]
    assert sorted(landed) == list(range(count))


def test_permuted_reaches_far_into_a_large_pool():
    landed = {permuted(index, 10**12, seed=3, epoch=1) for index in range(200)}
    assert len(landed) == 200
    assert max(landed) > 9 * 10**11


def test_permuted_changes_with_seed_epoch_and_domain():
    def order(**changes):
        settings = {"seed": 3, "epoch": 1, "domain": 0, **changes}
        return [permuted(index, 200, **settings) for index in range(200)]

    orders = [order(), order(seed=4), order(epoch=2), order(domain=1), order(domain=32)]
    for one, other in itertools.combinations(orders, 2):
        # Two random orders agree in one position on average.
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 8


# The 0.1 % points of chi squared with 3! - 1 and 4! - 1 degrees of freedom.
@pytest.mark.parametrize(("count", "critical"), [(3, 20.5), (4, 49.7)])
def test_permuted_finds_every_order_of_a_small_pool_equally_often(count, critical):
    trials = 1500
    orders = Counter(
        tuple(permuted(index, count, seed=5, epoch=epoch) for index in range(count))
        for epoch in range(trials)
    )
    expected = trials / math.factorial(count)
    chi_squared = sum(
        (orders[order] - expected) ** 2 / expected for order in itertools.permutations(range(count))
    )
    assert chi_squared < critical


def test_permuted_rejects_positions_outside():
    with pytest.raises(AssertionError, match=r"index=3 must be in \[0, 3\)"):
        permuted(3, 3, seed=0, epoch=0)
    with pytest.raises(AssertionError, match="epoch=16777216 must be in"):
        permuted(0, 3, seed=0, epoch=2**24)


def test_named_seed_is_fixed_by_seed_and_name_and_fits_a_generator():
    assert named_seed(1, "blocks.0.attn.qkv.weight") == named_seed(1, "blocks.0.attn.qkv.weight")
    seeds = {named_seed(seed, name) for seed in (0, 1) for name in ("a", "b", "1/a")}
    assert len(seeds) == 6
    for seed in seeds:
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)
