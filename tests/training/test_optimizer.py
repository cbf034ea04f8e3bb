from __future__ import annotations

import pytest
import torch

from longtake.parallel import ParallelConfig
from longtake.training import SkippedUpdates, learning_rate
from tests.processes import run_in_processes
from tests.toy_model import ToyModel, init_toy, toy_batch, toy_loss
from tests.training.toy_run import OPTIMIZER, SCHEDULE, TOTAL_STEPS, build_run


def _poisoned_run():
    run = build_run()
    skipped = SkippedUpdates(run.mesh.device)
    digests = []
    for step in range(4):
        poison = step in (1, 2) and run.mesh.rank == 1
        skipped.add(run.step(step, poison=poison))
        digests.append(run.local_digest())
        if step == 2:
            with pytest.raises(FloatingPointError, match="last 2 updates were not finite"):
                skipped.check(2)
            skipped.check(3)
            skipped.check(0)
    return digests, skipped.state_dict(), float(run.optimizer.state_dict()["state"][0]["step"])


def test_nan_on_one_process_skips_the_update_on_all_of_them():
    for digests, skipped, adam_step in run_in_processes(_poisoned_run, 2):
        assert digests[0] == digests[1] == digests[2], "a skipped update changed something"
        assert digests[3] != digests[2]
        assert skipped == {"total": 2, "in_a_row": 0}
        assert adam_step == 2


def _three_steps(config):
    run = build_run(config, decay=0.5)
    for step in range(3):
        run.step(step)
    return run.full()


@pytest.mark.parametrize("world_size", [1, 4])
def test_updates_are_those_of_plain_adamw_with_clipping(world_size):
    model = ToyModel()
    init_toy(model, lambda tensor, full: tensor.data.copy_(full))
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=0.1
    )
    averages = {name: param.detach().clone() for name, param in model.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        toy_loss(model, toy_batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = learning_rate(step, SCHEDULE, peak=OPTIMIZER.lr, total_steps=TOTAL_STEPS)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, param in model.named_parameters():
            averages[name] = decay * averages[name] + (1 - decay) * param.detach()

    config = ParallelConfig(dp_replicate=2) if world_size == 4 else ParallelConfig()
    found = run_in_processes(_three_steps, world_size, config)[0]
    for name, param in model.named_parameters():
        torch.testing.assert_close(found[f"model.{name}"], param.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[f"ema.{name}"], averages[name], rtol=1e-5, atol=1e-6)
        moments = optimizer.state[param]
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(
                found[f"optimizer.{name}.{key}"], moments[key], rtol=1e-4, atol=1e-7
            )


def test_a_run_of_skips_is_counted_from_where_it_was():
    skipped = SkippedUpdates(torch.device("cpu"), total=5, in_a_row=2)
    skipped.add(torch.tensor(0.0))
    assert skipped.state_dict() == {"total": 6, "in_a_row": 3}
    skipped.add(torch.tensor(1.0))
    assert skipped.state_dict() == {"total": 6, "in_a_row": 0}
