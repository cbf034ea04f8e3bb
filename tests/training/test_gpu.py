"""What differs on a GPU: copies that nobody waits for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longtake.ops import adamw_ema_kernel
from longtake.ops.kernels import KernelConfig, kernels_as
from longtake.parallel import local_part
from longtake.training import MetricsConfig, MetricsLog, read_metrics, update_weights
from longtake.training.checkpoint import training_state
from tests.processes import run_in_processes
from tests.toy_model import toy_batch, toy_loss
from tests.training.toy_run import build_run, checkpointer_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _sentinel(folder: Path, saves: int):
    """Checkpoint N holds nothing but N, though the next values come before the copy can be done."""
    run = build_run(width=2048, device="cuda")
    checkpointer = checkpointer_of(run, folder, keep_last=0)
    tensors = [local_part(t) for t in training_state(run.model, run.optimizer, run.ema).values()]
    for step in range(1, saves + 1):
        for value in (step, -1):
            for tensor in tensors:
                tensor.fill_(value)
            if value == step:
                checkpointer.save(step, run.model, run.optimizer, run.ema, {})
    checkpointer.wait()
    found = []
    for step in range(saves, 0, -1):
        checkpointer.resume(run.model, run.optimizer, run.ema)
        found.append({value for tensor in tensors for value in tensor.unique().tolist()})
        (folder / f"step-{step}").rename(folder / f"read-{step}")
    checkpointer.close()
    return found


def test_a_checkpoint_holds_one_moment(tmp_path):
    found = run_in_processes(_sentinel, 1, tmp_path, 5, timeout_seconds=200)[0]
    assert found == [{5.0}, {4.0}, {3.0}, {2.0}, {1.0}]


def _train_and_skip():
    run = build_run(device="cuda")
    digests = []
    for step in range(3):
        run.step(step, poison=step == 1)
        digests.append(run.local_digest())
    return digests


def test_a_skipped_update_changes_no_bit():
    first, skipped, third = run_in_processes(_train_and_skip, 1, timeout_seconds=200)[0]
    assert first == skipped != third


def _updates(kernels: KernelConfig, width: int):
    """Five updates, the fourth poisoned, that must not wait once the kernels are compiled.

    Gradients do not come of the weights: what rounding does to these would come back larger.
    """
    run = build_run(width=width, device="cuda")
    sharded = list(run.model.parameters())  # after a step the model shows what it gathered
    generator = torch.Generator("cuda").manual_seed(0)
    applied, kernel = [], adamw_ema_kernel.adamw_ema_kernel
    compiled = []
    with kernels_as(kernels):
        for step in range(5):
            loss = toy_loss(run.model, toy_batch(step).to("cuda"))
            loss.backward()
            for param in sharded:
                gradient = local_part(param.grad)
                gradient.normal_(generator=generator)
                if step == 3:
                    gradient.fill_(float("nan"))
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            _, flag = update_weights(
                run.model, run.optimizer, run.ema, clip_norm=1.0, lr=1e-2 / (1 + step), step=step
            )
            torch.cuda.set_sync_debug_mode("default")
            applied.append(float(flag))
            compiled.append(sum(len(caches[0]) for caches in kernel.device_caches.values()))
    return {name: tensor.cpu() for name, tensor in run.full().items()}, applied, compiled


@pytest.mark.parametrize("width", [8, 1000])
def test_fused_update_is_that_of_torch_and_never_waits(width: int):
    fused, torch_own = (KernelConfig(elementwise=name) for name in ("triton", "reference"))
    found, applied, compiled = run_in_processes(_updates, 1, fused, width, timeout_seconds=200)[0]
    expected, _, _ = run_in_processes(_updates, 1, torch_own, width, timeout_seconds=200)[0]
    assert applied == [1, 1, 1, 0, 1]
    assert compiled == [1] * 5, "a new learning rate compiles nothing"
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def _log(folder: Path):
    log = MetricsLog(folder, MetricsConfig(tensorboard=False))
    value = torch.ones((), device="cuda")
    first = log.log(1, {"loss": value})
    value.fill_(7)
    second = log.log(2, {"loss": value})
    log.close()
    return first, second


def test_metrics_come_one_log_step_later(tmp_path):
    first, second = run_in_processes(_log, 1, tmp_path, timeout_seconds=200)[0]
    assert first is None
    assert second["loss"] == 1
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1, 7]
