from __future__ import annotations

import builtins
import json
import sys

import pytest
import torch

from longtake.training import MetricsConfig, MetricsLog, read_metrics

PLAIN = MetricsConfig(tensorboard=False)


def test_lines_hold_numbers_and_tensors(tmp_path):
    log = MetricsLog(tmp_path, PLAIN)
    loss = torch.tensor(0.5)
    line = log.log(1, {"loss": loss, "lr": 1e-4, "skipped": torch.tensor([3])})
    loss.fill_(9)
    log.log(2, {"loss": torch.tensor(float("nan"))})
    log.close()
    assert line is not None
    assert line["loss"] == 0.5
    first, second = read_metrics(tmp_path)
    assert (first["step"], first["loss"], first["lr"], first["skipped"]) == (1, 0.5, 1e-4, 3)
    assert second["loss"] is None, "NaN is not JSON"


def test_resuming_removes_what_came_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path, PLAIN)
    for step in range(1, 6):
        log.log(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    log = MetricsLog(tmp_path, PLAIN, first_step=3)
    log.log(4, {"loss": 40.0})
    log.close()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1, 2, 3, 40]


def test_a_fresh_run_begins_with_an_empty_log(tmp_path):
    for _ in range(2):
        log = MetricsLog(tmp_path, PLAIN)
        log.log(1, {"loss": 1.0})
        log.close()
    assert len(read_metrics(tmp_path)) == 1


def test_only_the_writer_writes(tmp_path):
    log = MetricsLog(tmp_path / "run", PLAIN, is_writer=False)
    assert log.log(1, {"loss": torch.tensor(1.0)}) is None
    log.close()
    assert not (tmp_path / "run").exists()


def test_a_whole_tensor_is_no_metric(tmp_path):
    with pytest.raises(AssertionError, match=r"metric loss has shape \(2,\)"):
        MetricsLog(tmp_path, PLAIN).log(1, {"loss": torch.zeros(2)})


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    log = MetricsLog(tmp_path, MetricsConfig())
    log.log(1, {"loss": torch.tensor(0.25)})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.25)]


@pytest.mark.parametrize(
    ("config", "extra"),
    [
        (MetricsConfig(tensorboard=True), "train"),
        (MetricsConfig(tensorboard=False, wandb=True), "wandb"),
    ],
    ids=["tensorboard", "wandb"],
)
def test_a_requested_log_that_is_missing_names_what_to_install(
    tmp_path, monkeypatch, config, extra
):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith(("wandb", "torch.utils.tensorboard")):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=rf"pip install 'longtake\[{extra}\]'"):
        MetricsLog(tmp_path, config)


def test_lines_are_there_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path, PLAIN)
    log.log(1, {"loss": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
    log.close()
