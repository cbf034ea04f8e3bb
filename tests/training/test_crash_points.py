"""Ends a save before every single call that changes the disk: one whole checkpoint is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longtake.training.checkpoint_folder import find_damage, remove_leftovers, steps_saved
from tests.processes import Processes, run_in_processes
from tests.training.toy_run import build_run, checkpointer_of

CHANGES = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")
CRASHED = 9


def _save_and_crash(folder: Path, crash_at: int) -> None:
    """Goes on from the newest checkpoint, saves the next one, and ends before change `crash_at`."""
    run = build_run()
    checkpointer = checkpointer_of(run, folder, keep_last=1, in_background=False)
    extra = checkpointer.resume(run.model, run.optimizer, run.ema) or {"step": 0}
    run.step(extra["step"])

    num_changes = 0

    def counted(change):
        def call(*args, **kwargs):
            nonlocal num_changes
            num_changes += 1
            if num_changes == crash_at:
                os._exit(CRASHED)
            return change(*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    checkpointer.save(extra["step"] + 1, run.model, run.optimizer, run.ema, {})


def _resume(folder: Path) -> int:
    run = build_run()
    checkpointer = checkpointer_of(run, folder)
    extra = checkpointer.resume(run.model, run.optimizer, run.ema)
    checkpointer.close()
    assert extra is not None
    return extra["step"]


@pytest.mark.slow
def test_a_crash_at_any_point_leaves_the_old_or_the_new_checkpoint(tmp_path):
    with Processes(_save_and_crash, 1, tmp_path, 0) as processes:
        processes.results()
    outcomes = []
    for crash_at in range(1, 100):
        before = steps_saved(tmp_path)[0]
        with Processes(_save_and_crash, 1, tmp_path, crash_at) as processes:
            [code] = processes.exit_codes()
        after = steps_saved(tmp_path)
        assert after[0] in (before, before + 1)
        for step in after:
            assert find_damage(tmp_path / f"step-{step}") == [], f"crash at change {crash_at}"
        outcomes.append(after[0] - before)
        if code == 0:
            break
        assert code == CRASHED
    assert code == 0, "the save never came to its end"
    assert outcomes.count(0) >= 5, "no crash before the new checkpoint was there"
    assert outcomes.count(1) >= 3, "no crash after the new checkpoint was there"
    assert run_in_processes(_resume, 1, tmp_path) == [steps_saved(tmp_path)[0]]
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{steps_saved(tmp_path)[0]}"]
