"""update_weights: the fused update and the one of torch's own kernels, on one process and several.

Here the fused kernels are interpreted; that is what `elementwise="triton"` means on a CPU.
"""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from longtake.ops.kernels import KernelConfig, is_interpreted, kernels_as
from longtake.parallel import ParallelConfig, drop_gathered, local_part
from longtake.training import Ema, EmaConfig, OptimizerConfig, build_optimizer, update_weights
from longtake.training.optimizer import clip_factor
from tests.ops.interpreted_bfloat16 import correct_bfloat16
from tests.processes import run_in_processes
from tests.toy_model import ToyModel, init_toy, toy_batch, toy_loss
from tests.training.toy_run import build_run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
FUSED, TORCH = KernelConfig(elementwise="triton"), KernelConfig(elementwise="reference")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_cpu = pytest.mark.skipif(not is_interpreted(), reason="needs the interpreter")


def _four_updates(parallel: ParallelConfig, kernels: KernelConfig, poisoned: int | None):
    """Every tensor in full, whether each update was applied, and what this process then held."""
    run = build_run(parallel, decay=0.5)
    applied, digests = [], []
    with kernels_as(kernels):
        for step in range(4):
            poison = step == poisoned and run.mesh.rank == run.mesh.world_size - 1
            applied.append(float(run.step(step, poison=poison)))
            digests.append(run.local_digest())
            assert all(param.grad is None for param in run.model.parameters())
    return run.full(), applied, digests


@on_cpu
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, ParallelConfig()), (2, ParallelConfig()), (4, ParallelConfig(dp_replicate=2))],
    ids=["1", "2", "2x2"],
)
@pytest.mark.parametrize("poisoned", [None, 0, 2], ids=["all", "first-nan", "third-nan"])
def test_fused_update_is_that_of_torch(
    world_size: int, parallel: ParallelConfig, poisoned: int | None
):
    expected, _, _ = run_in_processes(_four_updates, 1, ParallelConfig(), TORCH, poisoned)[0]
    results = run_in_processes(_four_updates, world_size, parallel, FUSED, poisoned)
    for tensors, applied, digests in results:
        assert applied == [float(step != poisoned) for step in range(4)]
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                tensor, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
            if name.endswith(".step"):
                assert torch.equal(tensor, expected[name])
        for step in range(1, 4):
            assert (digests[step] == digests[step - 1]) == (step == poisoned)


def _gathered_once(dropped: bool, poisoned: int | None, swapped: int | None):
    """Weights, moments and averages after four updates, and whether the weights stayed gathered in
    bf16 and were those that the shards round to."""
    if is_interpreted():
        correct_bfloat16()
    run = build_run(ParallelConfig(param_dtype="bf16"), decay=0.5, device=DEVICE)
    sharded = dict(run.model.named_parameters())
    stayed = []
    with kernels_as(FUSED):
        for step in range(4):
            run.step(step, poison=step == poisoned)
            if step == swapped:
                with run.ema.swapped_in(), torch.no_grad():
                    toy_loss(run.model, toy_batch(9).to(DEVICE))
            shown = dict(run.model.named_parameters())
            stayed.append(all(shown[name] is not param for name, param in sharded.items()))
            for name, param in sharded.items():
                weight = local_part(param)
                assert torch.equal(
                    local_part(shown[name]).float(),
                    weight.bfloat16().float() if stayed[-1] else weight,
                )
            if dropped:
                drop_gathered(run.model)
    return run.full(), stayed


@pytest.mark.parametrize(
    ("poisoned", "swapped"), [(None, None), (2, None), (None, 1)], ids=["all", "nan", "swapped"]
)
def test_a_lone_process_gathers_weights_once_and_updates_them(poisoned, swapped):
    (expected, _), (found, stayed) = (
        run_in_processes(_gathered_once, 1, dropped, poisoned, swapped, timeout_seconds=200)[0]
        for dropped in (True, False)
    )
    assert stayed == [step != swapped for step in range(4)]
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def _plain_run(kernels: KernelConfig, clip_norm: float | None, frozen: bool):
    """A model that nobody sharded: update_weights, and the norms it returned."""
    model = ToyModel().to(DEVICE)
    init_toy(model, lambda tensor, full: tensor.data.copy_(full))
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, weight_decay=0.1))
    ema = Ema(model, EmaConfig(decay=0.9))
    norms = []
    with kernels_as(kernels):
        for step in range(3):
            toy_loss(model, toy_batch(step).to(DEVICE)).backward()
            if frozen:
                model.embed.bias.grad = None
                # An average that has somewhere to go, though its weight stays.
                model.embed.bias.data += 1
            norm, applied = update_weights(
                model, optimizer, ema, clip_norm=clip_norm, lr=1e-2 / (1 + step), step=step
            )
            norms.append(norm)
            assert applied == 1
    weights = {name: param.detach() for name, param in model.named_parameters()}
    moments = {
        f"{name}.{key}": tensor
        for name, param in model.named_parameters()
        for key, tensor in optimizer.state[param].items()
    }
    averages = {f"average.{name}": tensor for name, tensor in ema.averages.items()}
    return torch.stack(norms), weights | moments | averages


@pytest.mark.parametrize("clip_norm", [None, 0.05, 1e3], ids=["no-clip", "clipped", "below"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "one-without-gradient"])
def test_fused_update_of_a_plain_model(clip_norm: float | None, frozen: bool):
    norms, expected = _plain_run(TORCH, clip_norm, frozen)
    found_norms, found = _plain_run(FUSED, clip_norm, frozen)
    torch.testing.assert_close(found_norms, norms, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    if frozen:
        assert found["embed.bias.step"] == 0


def test_clip_factor_leaves_small_gradients_and_says_nan():
    assert clip_factor(torch.tensor(0.5), 1.0) == 1
    assert float(clip_factor(torch.tensor(4.0), 1.0)) == pytest.approx(0.25)
    assert clip_factor(torch.tensor(4.0), None) == 1
    assert math.isnan(clip_factor(torch.tensor(float("nan")), 1.0))


def _two_runs_in_turn():
    """Digests of two runs that take turns, as a program that trains two models would."""
    runs = [build_run(decay=0.5), build_run(decay=0.5)]
    with kernels_as(FUSED):
        for step in range(2):
            for run in runs:
                run.step(step)
    return [
        hashlib.sha256(local_part(p).cpu().numpy().tobytes()).hexdigest()
        for run in runs
        for p in run.model.parameters()
    ]


@on_cpu
def test_runs_in_one_process_do_not_mix_their_tables():
    digests = run_in_processes(_two_runs_in_turn, 1)[0]
    half = len(digests) // 2
    assert digests[:half] == digests[half:]


def test_gradients_are_asked_for():
    model = ToyModel().to(DEVICE)
    optimizer, ema = build_optimizer(model, OptimizerConfig()), Ema(model, EmaConfig())
    for kernels in (FUSED, TORCH):
        with kernels_as(kernels), pytest.raises(AssertionError, match="call it after backward"):
            update_weights(model, optimizer, ema, clip_norm=1.0, lr=1e-3, step=0)
