from __future__ import annotations

import torch

from longtake.parallel import local_part, read_full
from longtake.training import EmaConfig
from longtake.training.ema import decay_at
from tests.processes import run_in_processes
from tests.toy_model import toy_batch
from tests.training.toy_run import build_run


def test_decay_warms_up_to_its_value():
    config = EmaConfig(decay=0.9)
    assert decay_at(0, config) == 0.1
    assert decay_at(10, config) == 11 / 20
    assert decay_at(1000, config) == 0.9
    assert decay_at(0, EmaConfig(decay=0.9, warmup=False)) == 0.9


def _sharding():
    run = build_run()
    pairs = [(run.ema.averages[name], param) for name, param in run.model.named_parameters()]
    return [
        (tuple(average.placements) == tuple(param.placements), average.dtype)
        for average, param in pairs
    ], sum(local_part(average).numel() for average, _ in pairs)


def test_averages_are_fp32_and_sharded_like_the_weights():
    results = run_in_processes(_sharding, 2)
    assert all(same and dtype == torch.float32 for same, dtype in results[0][0])
    total = run_in_processes(_sharding, 1)[0][1]
    assert sum(count for _, count in results) == total


def _swap():
    run = build_run(decay=0.5)
    for step in range(3):
        run.step(step)
    weights = {name: read_full(param) for name, param in run.model.named_parameters()}
    digest = run.local_digest()
    batch = toy_batch(0)
    with torch.no_grad():
        plain = run.model(batch)
        with run.ema.swapped_in():
            averaged = run.model(batch)
            held = {name: read_full(param) for name, param in run.ema._params.items()}
        again = run.model(batch)
    expected = {name: read_full(average) for name, average in run.ema.averages.items()}
    after = run.local_digest()
    try:
        with run.ema.swapped_in():
            raise KeyError
    except KeyError:
        pass
    return {
        "model held the averages": all(torch.equal(held[n], expected[n]) for n in expected),
        "averages differ": any(not torch.equal(weights[n], expected[n]) for n in expected),
        "output differs": not torch.equal(plain, averaged),
        "output is back": torch.equal(plain, again),
        "every bit is back": digest == after == run.local_digest(),
    }


def test_swapping_in_is_undone_to_the_bit_even_after_inference():
    for found in run_in_processes(_swap, 2):
        assert all(found.values()), found
