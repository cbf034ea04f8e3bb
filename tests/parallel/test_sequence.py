"""Tokens of a sample spread over processes: always the loss and gradients of one process. What is
tried here in a few layouts, `make matrix` tries in all."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from longtake.ops.kernels import KernelConfig, kernels_as
from longtake.parallel.exchange import TokenGroup
from longtake.parallel.ring import ring_attention
from longtake.planning import exchanged_bytes, ring_bytes, token_grid
from tests.parallel.sequence_cases import (
    EVEN,
    FUSED,
    IMAGE,
    NAMES,
    SIZES,
    UNEVEN,
    Case,
    assert_same,
    errors_of,
    exchanged,
    graphs,
    in_double,
    orders_of_events,
    runs,
    sharded,
)
from tests.processes import run_in_processes

# Batches that are added up in another order, and nothing else.
DOUBLE, SINGLE = 1e-12, 1e-5


def test_in_double_every_model_has_the_gradients_of_one_process():
    cases = [Case(name).on(sp=2) for name in NAMES]
    cases += [
        Case("stdit", "iddpm", EVEN).on(sp=2),
        Case("pixart", "iddpm", EVEN).on(sp=2),
        # One frame: the other process has none, or half of the frame's tokens.
        Case("stdit2", "flow", IMAGE).on(sp=2),
        Case("dit", "iddpm", IMAGE).on(sp=2),
        # 9 places as 6 and 3, 8 as 4 and 4.
        Case("stdit2").on(sp=2, exchange_in_halves=True),
        Case("latte", "iddpm", EVEN).on(sp=2, exchange_in_halves=True),
    ]
    for results in run_in_processes(in_double, 2, cases, timeout_seconds=120):
        for case, found in zip(cases, results, strict=True):
            assert_same(found, case, tolerance=DOUBLE, dtype=torch.float64)


# 27 tokens, the last chunk shorter; 6 tokens, of which the last of four processes has none.
RINGS = {
    "2": (2, [Case("dit", num_heads=1)]),
    "3": (3, [Case("pixart", num_heads=2), Case("dit", "iddpm", EVEN, num_heads=2)]),
    "4": (4, [Case("pixart", "iddpm", IMAGE, num_heads=1)]),
    "heads 2 x ring 2": (4, [Case("pixart", num_heads=2), Case("dit", "iddpm", num_heads=2)]),
}


@pytest.mark.parametrize(("sp", "cases"), RINGS.values(), ids=RINGS)
def test_in_double_beyond_the_heads_gradients_are_those_of_one_process(sp, cases):
    cases = [case.on(sp=sp) for case in cases]
    for results in run_in_processes(in_double, sp, cases, timeout_seconds=120):
        for case, found in zip(cases, results, strict=True):
            assert_same(found, case, tolerance=DOUBLE, dtype=torch.float64)


@pytest.mark.slow
def test_sharded_checkpointed_compiled_and_accumulated_it_stays_the_same():
    cases = [
        Case("stdit").on(sp=2, checkpointing="none"),
        Case("stdit", accumulation=2).on(sp=2, checkpointing="full", compile=True),
        Case("stdit2", "iddpm").on(sp=2, compile=True),
        Case("stdit").on(sp=2, compile=True, exchange_in_halves=True),
        Case("latte").on(sp=2, checkpointing="full", exchange_in_halves=True),
        Case("pixart", accumulation=2).on(sp=2, checkpointing="full"),
        Case("pixart", "iddpm", EVEN).on(sp=2, compile=True),
        Case("latte").on(sp=2, compile=True, checkpointing="full"),
        Case("stdit", accumulation=2, piece_tokens=20).on(
            sp=2, checkpointing="nested", offload=True, compile=True
        ),
        Case("latte", piece_tokens=20).on(sp=2, checkpointing="nested"),
        Case("pixart", "iddpm", EVEN, piece_tokens=20).on(
            sp=2, checkpointing="nested", offload=True
        ),
        Case("pixart", num_heads=1).on(sp=2, compile=True, checkpointing="full"),
        Case("dit", "iddpm", num_heads=1, accumulation=2).on(sp=2),
    ]
    for results in run_in_processes(sharded, 2, cases, timeout_seconds=200):
        for case, found in zip(cases, results, strict=True):
            assert_same(found, case, tolerance=SINGLE)


@pytest.mark.slow
def test_on_fused_kernels_it_stays_the_same():
    pytest.importorskip("triton")
    cases = [
        Case("stdit2", kernels=FUSED).on(sp=2, compile=True),
        # Micro-batches of one arrive in order: PyTorch 2.11 took what needs no copy for a view.
        Case("stdit", kernels=FUSED, accumulation=4).on(sp=2, compile=True, checkpointing="none"),
        Case("pixart", kernels=FUSED).on(sp=2, compile=True, checkpointing="full"),
        Case("stdit", kernels=FUSED, piece_tokens=40, kept_keys=9).on(
            sp=2, compile=True, checkpointing="nested"
        ),
        Case("dit", kernels=FUSED, kept_keys=27).on(sp=2, checkpointing="nested"),
        Case("stdit", kernels=FUSED, piece_tokens=40).on(
            sp=2, compile=True, checkpointing="nested", pieces="pointwise", kept_blocks=1
        ),
    ]
    for results in run_in_processes(sharded, 2, cases, timeout_seconds=250):
        for case, found in zip(cases, results, strict=True):
            assert_same(found, case, tolerance=1e-4)


def test_however_deep_a_model_blocks_of_a_kind_share_a_graph():
    cases = [Case(name).on(sp=2, compile=True) for name in ("pixart", "stdit", "latte")]
    cases.append(Case("pixart", num_heads=1).on(sp=2, compile=True))
    cases.append(Case("stdit", piece_tokens=40).on(sp=2, compile=True, checkpointing="nested"))
    deeper = [replace(case, depth=2 * case.depth) for case in cases]
    for counts in run_in_processes(graphs, 2, cases + deeper, timeout_seconds=120):
        shallow, deep = counts[: len(cases)], counts[len(cases) :]
        assert deep == shallow
        assert min(shallow) > 0


@pytest.mark.slow
def test_with_data_parallel_groups_it_stays_the_same():
    cases = [
        Case("stdit2").on(sp=2),
        Case("pixart").on(sp=2, dp_replicate=2),
        Case("stdit", "iddpm").on(sp=4),  # one process has no frame at all
        Case("pixart", num_heads=1).on(sp=2, dp_replicate=2),
        Case("pixart", num_heads=2).on(sp=4, compile=True),
    ]
    for results in run_in_processes(sharded, 4, cases, timeout_seconds=200):
        for case, found in zip(cases, results, strict=True):
            assert_same(found, case, tolerance=SINGLE)


@pytest.mark.slow
def test_twenty_steps_have_the_losses_of_one_process():
    cases = [Case("stdit"), Case("pixart", "iddpm")]
    (expected,) = run_in_processes(runs, 1, cases, 20, timeout_seconds=120)
    spread = [case.on(sp=2) for case in cases]
    for results in run_in_processes(runs, 2, spread, 20, timeout_seconds=120):
        for (losses, norms), (same_losses, same_norms) in zip(results, expected, strict=True):
            assert losses == pytest.approx(same_losses, rel=1e-4)
            assert norms == pytest.approx(same_norms, rel=1e-3)
            assert len(set(losses)) == 20


CASES_ON_GPUS = (
    Case("stdit", accumulation=2),
    Case("stdit2", "iddpm"),
    Case("latte"),
    Case("pixart", "iddpm"),
    Case("pixart", num_heads=1),
)
DEEP = Case("stdit", depth=8, accumulation=2)
"""Deep enough for units of two blocks."""

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.gpu
@two_gpus
def test_on_two_gpus_it_stays_the_same():
    plain = {"param_dtype": "fp32", "compile": False}
    cases = [case.on(sp=2, **plain) for case in CASES_ON_GPUS]
    cases += [DEEP.on(zero=zero, **plain) for zero in (0, 1, 2, 3)]
    for results in run_in_processes(sharded, 2, cases, "cuda", timeout_seconds=250):
        for case, found in zip(cases, results, strict=True):
            assert_same(found, case, tolerance=1e-4)


@pytest.mark.gpu
@two_gpus
@pytest.mark.timeout(700)
def test_on_two_gpus_compiled_bf16_is_no_further_off_than_on_one():
    cases = [replace(case, kernels=KernelConfig()) for case in (*CASES_ON_GPUS, DEEP)]
    (lone,) = run_in_processes(sharded, 1, cases, "cuda", timeout_seconds=250)
    spread = [case.on(sp=2) for case in cases[:-1]]
    spread += [case.on(sp=2, exchange_in_halves=True) for case in cases[:3]]
    spread += [cases[-1].on(zero=zero) for zero in (0, 2, 3)]
    same = lone[:-1] + lone[:3] + 3 * lone[-1:]
    for results in run_in_processes(sharded, 2, spread, "cuda", timeout_seconds=400):
        for case, found, one in zip(spread, results, same, strict=True):
            allowed = errors_of(one, case)
            for name, error in errors_of(found, case).items():
                assert error <= 2 * allowed[name] + 1e-3, (case.model, name, error, allowed[name])


def test_what_is_exchanged_is_what_the_formula_says():
    cases = [
        Case(name, latents=latents).on(sp=2, checkpointing=checkpointing)
        for name, latents, checkpointing in (
            ("stdit", EVEN, "none"),
            ("stdit", UNEVEN, "full"),
            ("latte", UNEVEN, "none"),
            ("pixart", EVEN, "full"),
            ("dit", UNEVEN, "selective"),
        )
    ]
    cases.append(Case("stdit2", latents=UNEVEN).on(sp=2, exchange_in_halves=True))
    cases.append(Case("dit", num_heads=1).on(sp=2, checkpointing="full"))
    cases += [Case(name).on(sp=2, checkpointing="nested") for name in ("dit", "stdit")]
    _assert_exchanged(cases, 2, ring=lambda case: 1 if case.num_heads > 1 else 2)
    _assert_exchanged([Case("pixart", num_heads=2).on(sp=4)], 4, ring=lambda case: 2)


def _assert_exchanged(cases, sp, *, ring):
    for results in run_in_processes(exchanged, sp, cases):
        for case, (in_all_to_alls, around) in zip(cases, results, strict=True):
            where = case.model, token_grid(case.latents)
            sizes = {"hidden_size": SIZES["hidden_size"], "depth": SIZES["depth"], "sp": sp}
            sizes |= {"ring": ring(case), "bytes_per_value": 4}
            again = case.parallel.checkpointing in ("full", "nested")
            if case.parallel.checkpointing == "nested" and case.model == "dit":
                again = 2  # exchanges within the branch, which is computed once more
            expected = exchanged_bytes(*where, **sizes)
            assert in_all_to_alls == (expected, expected * (1 + again)), case
            expected = ring_bytes(*where, **sizes)
            assert around == (expected, expected * (2 + again)), case


def test_one_half_of_the_places_travels_while_the_other_is_computed_with():
    whole, halves = (Case("stdit2").on(sp=2, exchange_in_halves=choice) for choice in (False, True))
    for orders in run_in_processes(orders_of_events, 2, [whole, halves]):
        assert orders == [("swmsw", "swmsw"), ("sswmswmsww", "sswmswmsww")]


def test_kernels_that_cannot_go_around_a_ring_are_refused():
    ring = TokenGroup("none", size=2, rank=0, timeout=timedelta(seconds=1))
    with (
        kernels_as(KernelConfig(self_attention="triton")),
        pytest.raises(ValueError, match=r'self-attention by "triton" .* divisor of the model'),
    ):
        ring_attention(torch.zeros(1, 4, 3, 2, 8), ring, num_tokens=8)
