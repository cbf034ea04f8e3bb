import pytest

from longtake.benchmark.records import Trial
from longtake.benchmark.search import (
    DoesNotFit,
    best_micro_batch,
    first_micro_batch,
    memory_allows,
)


def _device(rates, *, fits):
    """Tries that make so many samples per second up to the largest that fits."""
    tried = []

    def attempt(micro_batch):
        tried.append(micro_batch)
        rate = rates(micro_batch) if micro_batch <= fits else None
        return Trial(micro_batch=micro_batch, samples_per_second=rate, peak_gib=1.0)

    return attempt, tried


def test_search_doubles_while_it_pays():
    attempt, tried = _device(lambda size: min(size, 8.0), fits=1000)
    best, trials = best_micro_batch(attempt, start=1)
    assert best == 8
    assert tried == [1, 2, 4, 8, 16]
    assert [trial.micro_batch for trial in trials] == tried


def test_search_fills_memory_by_half_a_doubling_more():
    attempt, tried = _device(float, fits=13)
    assert best_micro_batch(attempt, start=1)[0] == 12
    assert tried == [1, 2, 4, 8, 16, 12]


@pytest.mark.parametrize(("fits", "best"), [(25, 24), (23, 20), (19, 18), (17, 16)])
def test_search_fills_memory_by_the_largest_part_that_fits(fits: int, best: int):
    attempt, tried = _device(float, fits=1000)
    found, _ = best_micro_batch(attempt, start=8, may_fit=lambda size, trials: size <= fits)
    assert found == best
    assert tried == ([8, 16, best] if best > 16 else [8, 16])


def test_search_does_not_take_a_part_more_that_is_slower():
    attempt, tried = _device(lambda size: size if size <= 16 else 15.0, fits=19)
    assert best_micro_batch(attempt, start=16)[0] == 16
    assert tried == [16, 32, 24, 20, 18]


def test_search_goes_down_until_something_fits():
    attempt, tried = _device(float, fits=3)
    assert best_micro_batch(attempt, start=16)[0] == 3
    assert tried == [16, 8, 4, 2, 3]


def test_search_says_when_nothing_fits():
    attempt, tried = _device(float, fits=0)
    with pytest.raises(DoesNotFit, match="micro-batch of 1"):
        best_micro_batch(attempt, start=4)
    assert tried == [4, 2, 1]


def test_search_does_not_try_what_cannot_fit():
    attempt, tried = _device(float, fits=1000)
    best, _ = best_micro_batch(attempt, start=1, may_fit=lambda size, trials: size <= 4)
    assert best == 4
    assert tried == [1, 2, 4]


def test_memory_is_predicted_by_the_line_through_what_is_needed_anyway():
    trials = [Trial(micro_batch=2, samples_per_second=1.0, peak_gib=30.0)]
    # 20 GiB and 5 a sample: 8 samples take 60, 4 % of the limit are left free.
    assert memory_allows(8, trials, fixed_gib=20.0, limit_gib=63.0)
    assert not memory_allows(8, trials, fixed_gib=20.0, limit_gib=62.0)
    assert memory_allows(1000, [], fixed_gib=20.0, limit_gib=62.0)


def test_search_begins_where_a_device_is_busy():
    assert [first_micro_batch(tokens) for tokens in (256, 4096, 16_384, 65_536)] == [128, 8, 2, 1]
