"""What is worth keeping: what is asked for most often, for its bytes, as far as there is room."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from longtake.data import Bucket, DataConfig
from longtake.store.budget import Budget, demand_of, shares_kept
from longtake.store.catalog import read_catalog
from longtake.store.plan import missing_work
from longtake.store.rates import Rate
from tests.store.test_plan import BUCKETS, _content, _do, recipe  # noqa: F401

DATA = DataConfig(
    buckets=(
        replace(BUCKETS[0], weight=3.0, batch_size=8),
        Bucket(num_frames=1, height=16, width=16, weight=1.0, batch_size=16),
    ),
    flip=True,
)
RATES = {
    ("clips", 0): Rate(seconds=0.4, num_bytes=24 * 16 * 2),
    ("clips", 1): Rate(seconds=0.001, num_bytes=24 * 4 * 2),
    ("text", 0): Rate(seconds=0.002, num_bytes=96.0),
}


def _rows(count=10):
    rows = [{"path": f"{k}.mp4", "caption": f"clip {k}"} for k in range(count)]
    rows[4]["caption"] = rows[5]["caption"] = rows[8]["caption"] = "the same"
    return rows


@pytest.fixture
def case(tmp_path, recipe):  # noqa: F811
    manifest, content = _content(tmp_path, recipe, _rows())
    return manifest, recipe, content, demand_of(content, recipe, DATA)


def _budget(case, size):
    manifest, recipe, content, demand = case  # noqa: F811
    return Budget(size, manifest, recipe, content, demand, RATES)


def _work(case, store):
    _, recipe, content, demand = case  # noqa: F811
    catalog = read_catalog(store)
    work = missing_work(content, recipe, catalog, shard_bytes=3 * 2 * 24 * 16 * 4, demand=demand)
    return work, catalog


def test_a_step_asks_for_what_its_buckets_take(case):
    *_, demand = case
    # Three steps of four take 8 of 10 samples, on one of two sides each.
    assert demand["clips", 0] == pytest.approx(np.full(10, 0.75 * 8 / 10 / 2))
    assert demand["clips", 1] == pytest.approx(np.full(10, 0.25 * 16 / 10 / 2))
    # A caption that three samples share is asked for three times as often, and encoded once.
    per_sample = 0.75 * 8 / 10 + 0.25 * 16 / 10
    expected = np.full(10, per_sample)
    expected[4], expected[[5, 8]] = 3 * per_sample, 0
    assert demand["text", 0] == pytest.approx(expected)


def test_what_is_asked_for_most_is_encoded_first(case, tmp_path):
    work, _ = _work(case, tmp_path)
    text = np.concatenate([item.sample_ids for item in work if item.kind == "text"])
    assert text.tolist() == [4, 0, 1, 2, 3, 6, 7, 9]


def test_what_saves_most_per_byte_is_kept(case, tmp_path):
    work, catalog = _work(case, tmp_path)
    budget = _budget(case, 10**6)
    worth = {item.group: budget.worth(item) for item in work}
    assert worth["clips", 0] > worth["text", 0] > worth["clips", 1]
    chosen = budget.affordable(work, catalog)
    assert len(chosen) == len(work)
    assert [item.group for item in chosen] == sorted(
        (item.group for item in chosen), key=lambda group: -worth[group]
    )
    first = sum(map(budget.bound, chosen[:2]))
    small = _budget(case, budget.index_bytes + first + 1)
    assert small.affordable(work, catalog) == chosen[:2]
    assert _budget(case, budget.index_bytes).affordable(work, catalog) == []


def test_nothing_takes_more_than_was_reckoned(case, tmp_path):
    work, catalog = _work(case, tmp_path)
    budget = _budget(case, 10**6)
    before = budget.room(catalog)
    for item in work:
        path = _do(tmp_path, case[1], item)
        assert path.stat().st_size <= budget.bound(item)
    written = sum(read_catalog(tmp_path).shard_sizes)
    assert budget.room(read_catalog(tmp_path)) == before - written


def test_what_is_worth_least_goes_first_and_what_nobody_needs_before(case, tmp_path):
    work, _ = _work(case, tmp_path)
    paths = {item.name: _do(tmp_path, case[1], item) for item in work}
    stranger = replace(
        work[0], name="0" * 16, keys=np.array([[b"k%015d" % k] for k in range(len(work[0].keys))])
    )
    nobodys = _do(tmp_path, case[1], stranger)
    catalog = read_catalog(tmp_path)
    used = sum(catalog.shard_sizes)
    fits = _budget(case, used + _budget(case, 1).index_bytes)
    assert fits.too_much(catalog, []) == []
    # Where all fits, room for something new comes from what nobody needs, and from nothing else.
    assert fits.too_much(catalog, work) == [nobodys.name]
    less = _budget(case, fits.size - nobodys.stat().st_size - 1)
    removed = less.too_much(catalog, [])
    assert removed[0] == nobodys.name
    last = [paths[item.name].name for item in work if item.group == ("clips", 1)]
    assert set(removed[1:]) <= set(last)
    assert len(removed) == 2


def test_shares_say_what_a_store_saves(case, tmp_path):
    from longtake.store.assemble import make_index

    manifest, recipe, content, demand = case  # noqa: F811
    work, _ = _work(case, tmp_path)
    for item in work:
        if item.group == ("clips", 0):
            _do(tmp_path, recipe, item, failing={3})
            break
    index = make_index(manifest, recipe, content, read_catalog(tmp_path), {})
    shares = {share.group: share for share in shares_kept(index, content, demand)}
    clips = shares["clips", 0]
    taken = len(item.sample_ids)
    failed = 3 in item.sample_ids
    assert clips.kept == 2 * (taken - failed)
    assert clips.needed == 2 * (10 - failed)
    assert clips.kept_per_step == pytest.approx(clips.kept * 0.3)
    assert (shares["text", 0].kept, shares["text", 0].needed) == (0, 8)
    assert shares["text", 0].needed_per_step == pytest.approx(10.0)
