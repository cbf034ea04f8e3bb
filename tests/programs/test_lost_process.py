"""A process that is lost or hangs ends the job; torchrun starts it again, and the losses are those
of a run that nobody disturbed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longtake.config import TrainConfig
from longtake.parallel import ParallelConfig
from longtake.training import CheckpointConfig
from longtake.training.checkpoint_folder import steps_saved
from tests.programs.runs import (
    assert_same_bits,
    longtake_in,
    numbers,
    run_folder,
    save_config,
    tiny_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STEPS, EVERY = 120, 20


def _config(folder, manifest, **parallel):
    return tiny_config(
        folder,
        manifest,
        train=TrainConfig(steps=STEPS, log_every_steps=1),
        checkpoint=CheckpointConfig(every_steps=EVERY, keep_last=0),
        parallel=ParallelConfig(**parallel),
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, manifest):
    config = _config(tmp_path_factory.mktemp("undisturbed"), manifest)
    outcomes = longtake_in(2, "train", "--config", save_config(config))
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].err
    return run_folder(config)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda n: n.name)
def test_a_run_that_loses_a_process_goes_on_from_its_checkpoint(
    tmp_path, manifest, undisturbed, number
):
    config = _config(tmp_path, manifest, timeout_seconds=8)
    folder = run_folder(config)
    output = tmp_path / "output.txt"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", "-m", "longtake", "train"]
    with (
        open(output, "w") as file,
        subprocess.Popen(
            [*command, "--config", save_config(config)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        ) as torchrun,
    ):
        try:
            _wait_until(lambda: steps_saved(folder / "checkpoints"), torchrun, output)
            os.kill(_worker(torchrun.pid, rank=1), number)
            saved = steps_saved(folder / "checkpoints")[0]
            assert saved < STEPS, "it was over before anything could go wrong"
            # A process that is stopped takes torchrun 30 s: it asks first, and kills then.
            assert torchrun.wait(200) == 0, output.read_text()
        finally:
            torchrun.kill()

    text = output.read_text()
    resumed = re.search(r"resumed from \S+step-(\d+)", text)
    assert resumed, text
    assert saved <= int(resumed[1]) < STEPS
    if number == signal.SIGSTOP:
        assert re.search(r"nothing has moved for \d+ s since .* parallel.timeout_seconds=8", text)
        assert re.search(r"rank 0 .*: no sign of life from rank 1 \(\S+, process \d+\)", text)
        assert "train.py" in text.split("Where its threads are:")[1]
    else:
        assert "rank 0" in text
        # Once in a while gloo does not notice that the other side is gone.
        words = " ".join(text.split())
        assert "has lost another process" in words or "nothing has moved" in words
    assert numbers(folder) == numbers(undisturbed)
    assert_same_bits(folder, undisturbed)


def _worker(torchrun: int, *, rank: int) -> int:
    """The process id of one of torchrun's processes."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no process of rank {rank}: {children}")


def _wait_until(condition, torchrun: subprocess.Popen, output: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert torchrun.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.02)
