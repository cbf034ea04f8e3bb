"""Every model and objective in every layout of 1, 2 or 4 token groups of 1, 2 or 4 processes: takes
minutes and up to 16 processes, so `make matrix` runs it."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.parallel.sequence_cases import (
    EVEN,
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
