"""ZeRO-0 to -3 and HSDP: what is spread, and when it is reduced, changes no number."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.models import init_weights
from longtake.parallel import (
    ParallelConfig,
    build_mesh,
    drop_gathered,
    local_part,
    read_full,
    start_distributed,
)
from longtake.parallel.mesh import resolve_degrees
from longtake.pipeline import Trainee, training_step
from longtake.training import Ema, EmaConfig, OptimizerConfig, build_optimizer
from tests.parallel.sequence_cases import (
    BATCH,
    UNEVEN,
    Case,
    assert_same,
    inputs_of,
    objective_of,
    parallel_model,
    sharded,
)
from tests.processes import run_in_processes

LEVELS = (0, 1, 2, 3)
STEPS = 3


def test_at_every_level_loss_and_gradients_are_those_of_one_process():
    cases = [Case("stdit", accumulation=2).on(zero=zero) for zero in LEVELS]
    cases += [
        Case("stdit2").on(zero=0, sp=2),
        Case("pixart").on(zero=2, checkpointing="nested", offload=True),
        # Units of two blocks and of the one left over, or a unit of all.
        Case("stdit", depth=3, accumulation=2).on(zero=3, blocks_per_unit=2, checkpointing="full"),
        Case("latte", depth=3).on(zero=2, blocks_per_unit=2, compile=True),
        Case("dit", depth=3).on(zero=0, blocks_per_unit=8),
    ]
    for results in run_in_processes(sharded, 2, cases, timeout_seconds=150):
        for case, found in zip(cases, results, strict=True):
            assert_same(found, case, tolerance=1e-5)


@pytest.mark.slow
def test_replicas_of_shards_have_the_gradients_of_one_process():
    cases = [Case("stdit").on(zero=zero, dp_replicate=2) for zero in (1, 2, 3)]
    cases += [Case("latte").on(zero=0), Case("dit").on(zero=3, dp_replicate=2, sp=2)]
    for results in run_in_processes(sharded, 4, cases, timeout_seconds=200):
        for case, found in zip(cases, results, strict=True):
            assert_same(found, case, tolerance=1e-5)


def _trained(levels: tuple[int, ...], accumulation: int):
    """Losses, norms, weights and averages of a few steps that clipping holds back."""
    device = start_distributed("cpu")
    results = []
    for zero in levels:
        case = Case("stdit", latents=UNEVEN, depth=8).on(zero=zero)
        mesh = build_mesh(case.parallel, device)
        model = parallel_model(case, mesh)
        trainee = Trainee(
            model=model,
            objective=objective_of(case),
            optimizer=build_optimizer(model, OptimizerConfig(lr=3e-3)),
            ema=Ema(model, EmaConfig()),
        )
        count = BATCH // mesh.dp_size // accumulation
        first = mesh.dp_rank * count * accumulation
        norms = []
        for step in range(STEPS):
            micro_batches = [
                inputs_of(case, range(first + i * count, first + (i + 1) * count), step)
                for i in range(accumulation)
            ]
            result = training_step(
                trainee,
                micro_batches,
                num_micro_batches=accumulation,
                condition_dropout=0.4,
                clip_norm=0.1,
                lr=3e-3,
                step=step,
            )
            norms.append(float(result.gradient_norm))
        params = {n: read_full(p) for n, p in trainee.ema._params.items()}
        averages = {n: read_full(a) for n, a in trainee.ema.averages.items()}
        held = sum(local_part(a).numel() for a in trainee.ema.averages.values())
        results.append((norms, params, averages, held))
    return results


def test_clipping_weights_and_averages_are_those_of_one_process_at_every_level():
    ((norms, params, averages, total),) = run_in_processes(_trained, 1, (3,), 2)[0]
    assert min(norms) > 0.1, "clipping has nothing to do"
    results = run_in_processes(_trained, 2, LEVELS, 2, timeout_seconds=150)
    for by_level in results:
        for found_norms, found_params, found_averages, _ in by_level:
            assert found_norms == pytest.approx(norms, rel=1e-4)
            for found, expected in ((found_params, params), (found_averages, averages)):
                for name, tensor in expected.items():
                    torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    for zero in LEVELS:
        held = sum(by_level[zero][3] for by_level in results)
        assert held == (2 * total if zero == 0 else total), zero


class _CountReductions(TorchDispatchMode):
    """Counts the collectives that reduce gradients, within the context."""

    count = 0
    between_replicas = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "reduce_scatter" in str(func)
        self.between_replicas += "allreduce" in str(func)
        return func(*args, **(kwargs or {}))


def _reductions(levels: tuple[int, ...]) -> list[int]:
    """Of a step of two micro-batches, by level."""
    from longtake.parallel import sync_gradients
    from tests.parallel.sequence_cases import loss_of

    device = start_distributed("cpu")
    counts = []
    for zero in levels:
        case = Case("dit").on(zero=zero)
        model = parallel_model(case, build_mesh(case.parallel, device))
        with _CountReductions() as counted:
            for number in range(2):
                sync_gradients(model, is_last=number == 1)
                loss_of(model, case, inputs_of(case, range(1))).backward()
        counts.append(counted.count)
    return counts


def test_levels_below_2_reduce_once_a_step_and_the_others_every_micro_batch():
    one, two, three = run_in_processes(_reductions, 2, (1, 2, 3), timeout_seconds=90)[0]
    assert one > 0
    assert (two, three) == (2 * one, 2 * one)


def _messages(cases: list[Case]) -> list[int]:
    from tests.parallel.sequence_cases import loss_of

    device = start_distributed("cpu")
    counts = []
    for case in cases:
        model = parallel_model(case, build_mesh(case.parallel, device))
        with _CountReductions() as counted:
            loss_of(model, case, inputs_of(case, range(1))).backward()
        counts.append(counted.count)
    return counts


def test_blocks_whose_weights_stay_gathered_are_reduced_in_a_few_messages():
    deep = Case("dit", depth=8)
    cases = [deep.on(zero=1), deep.on(zero=2), deep.on(zero=3), deep.on(zero=2, blocks_per_unit=1)]
    cases.append(deep.on(zero=3, blocks_per_unit=3))
    # And one for what is not a block.
    assert run_in_processes(_messages, 2, cases, timeout_seconds=90)[0] == [5, 5, 9, 9, 4]
    with pytest.raises(ValueError, match=r"blocks_per_unit=0 must be at least 1"):
        ParallelConfig(blocks_per_unit=0)


MICRO_BATCHES = 3


def _replicated(levels: tuple[int, ...]):
    """All-reduces and gradients of two replicas of two shards, by level."""
    from longtake.parallel import sync_gradients
    from tests.parallel.sequence_cases import loss_of

    device, results = start_distributed("cpu"), []
    for zero in levels:
        case = Case("dit").on(zero=zero, dp_replicate=2)
        mesh = build_mesh(case.parallel, device)
        model = parallel_model(case, mesh)
        with _CountReductions() as counted:
            for number in range(MICRO_BATCHES):
                sync_gradients(model, is_last=number == MICRO_BATCHES - 1)
                own = inputs_of(case, range(number, number + 1), step=mesh.dp_rank)
                loss_of(model, case, own).backward()
        drop_gathered(model)
        gradients = {n: read_full(p.grad) for n, p in model.named_parameters()}
        results.append((counted.between_replicas, gradients))
    return results


def test_replicas_reduce_once_a_step_at_every_level():
    from tests.parallel.sequence_cases import build, loss_of, write_shaken

    case = Case("dit")
    model = build(case)
    init_weights(model, seed=0, write=write_shaken)
    for step in range(4):
        for number in range(MICRO_BATCHES):
            inputs = inputs_of(case, range(number, number + 1), step=step)
            (loss_of(model, case, inputs) / 4).backward()
    counts = set()
    for count, found in run_in_processes(_replicated, 4, (1, 2, 3), timeout_seconds=120)[0]:
        counts.add(count)
        for name, param in model.named_parameters():
            torch.testing.assert_close(found[name], param.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert len(counts) == 1
    assert min(counts) > 0


def test_replicas_leave_nothing_to_shard():
    assert resolve_degrees(ParallelConfig(zero=0), 8) == (8, 1)
    assert resolve_degrees(ParallelConfig(zero=0, sp=2, dp_replicate=4), 8) == (4, 1)
    with pytest.raises(ValueError, match=r"zero=0 .* dp_replicate=2 .* zero=1, 2 or 3"):
        resolve_degrees(ParallelConfig(zero=0, dp_replicate=2), 8)
