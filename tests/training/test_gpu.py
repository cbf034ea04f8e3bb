"""What differs on a GPU: copies that nobody waits for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longtake.parallel import local_part
from longtake.training import MetricsConfig, MetricsLog, read_metrics
from longtake.training.checkpoint import training_state
from tests.processes import run_in_processes
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
