"""Every model and objective in every layout of 1, 2 or 4 token groups of 1, 2 or 4 processes: takes
minutes and up to 16 processes, so `make matrix` runs it."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from tests.parallel.sequence_cases import (
    EVEN,
    IMAGE,
    NAMES,
    UNEVEN,
    Case,
    assert_same,
    in_double,
    runs,
    sharded,
)
from tests.processes import run_in_processes

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1800)]

CASES = [
    Case(name, objective, latents)
    for name in NAMES
    for objective in ("flow", "iddpm")
    for latents in (EVEN, UNEVEN)
]
RUNS = [Case(name, objective) for name in NAMES for objective in ("flow", "iddpm")]
STEPS = 20
LAYOUTS = [(dp, sp) for dp in (1, 2, 4) for sp in (1, 2, 4)]


@pytest.mark.parametrize(("dp", "sp"), LAYOUTS)
def test_loss_and_gradients_are_those_of_one_process(dp, sp):
    cases = [case.on(sp=sp) for case in CASES]
    for results in run_in_processes(in_double, dp * sp, cases, timeout_seconds=1500):
        for case, found in zip(cases, results, strict=True):
            assert_same(found, case, tolerance=1e-12, dtype=torch.float64)


# Heads by which some of the processes are spread, and the rest, or all, are a ring.
RINGS = [(1, 2, 1), (1, 3, 2), (2, 2, 1), (1, 4, 1), (1, 4, 2), (2, 4, 2), (1, 6, 2), (1, 8, 4)]
RING_CASES = [case for case in CASES if case.model in ("dit", "pixart")]
RING_CASES += [Case("pixart", latents=IMAGE), Case("dit", "iddpm", IMAGE)]


@pytest.mark.parametrize(("dp", "sp", "num_heads"), RINGS)
def test_beyond_the_heads_loss_and_gradients_are_those_of_one_process(dp, sp, num_heads):
    cases = [replace(case.on(sp=sp), num_heads=num_heads) for case in RING_CASES]
    for results in run_in_processes(in_double, dp * sp, cases, timeout_seconds=1500):
        for case, found in zip(cases, results, strict=True):
            assert_same(found, case, tolerance=1e-12, dtype=torch.float64)


@functools.cache
def _expected():
    return run_in_processes(runs, 1, RUNS, STEPS, timeout_seconds=600)[0]


@pytest.mark.parametrize(("dp", "sp"), LAYOUTS[1:])
def test_runs_have_the_losses_of_one_process(dp, sp):
    cases = [case.on(sp=sp) for case in RUNS]
    for results in run_in_processes(runs, dp * sp, cases, STEPS, timeout_seconds=1500):
        for case, (losses, _), (same, _) in zip(cases, results, _expected(), strict=True):
            assert losses == pytest.approx(same, rel=1e-4), case


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("dp", "sp"), LAYOUTS[1:])
def test_at_every_level_of_zero_gradients_are_those_of_one_process(dp, sp, zero):
    cases = [
        Case(name, accumulation=2 if dp < 4 else 1, piece_tokens=20).on(
            sp=sp, zero=zero, checkpointing=policy, offload=policy != "selective"
        )
        for name in NAMES
        for policy in ("selective", "full", "nested")
    ]
    if zero and dp > 1:
        cases += [case.on(sp=sp, zero=zero, dp_replicate=2) for case in cases[::3]]
    for results in run_in_processes(sharded, dp * sp, cases, timeout_seconds=1500):
        for case, found in zip(cases, results, strict=True):
            assert_same(found, case, tolerance=1e-5)
