"""A whole training run in miniature; the tests stop, kill and resume it."""

from __future__ import annotations

import hashlib
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from longtake.parallel import (
    Mesh,
    ParallelConfig,
    build_mesh,
    local_part,
    materialize,
    parallelize,
    read_full,
    start_distributed,
    write_full,
)
from longtake.training import (
    STOPPED_EXIT_CODE,
    CheckpointConfig,
    Checkpointer,
    Ema,
    EmaConfig,
    MetricsConfig,
    MetricsLog,
    OptimizerConfig,
    ScheduleConfig,
    SkippedUpdates,
    StopRequest,
    build_optimizer,
    hold_run_folder,
    learning_rate,
    update_weights,
)
from longtake.training.checkpoint import training_state
from tests.toy_model import ToyModel, init_toy, toy_batch, toy_loss

OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1)
SCHEDULE = ScheduleConfig(warmup_steps=3, shape="cosine")
TOTAL_STEPS = 40


@dataclass
class Run:
    mesh: Mesh
    model: torch.nn.Module
    optimizer: torch.optim.AdamW
    ema: Ema

    def step(self, step: int, *, poison: bool = False) -> torch.Tensor:
        """One update; poison puts NaN into this process's loss."""
        samples = toy_batch(step).chunk(self.mesh.dp_size)[self.mesh.dp_rank]
        loss = toy_loss(self.model, samples.to(self.mesh.device))
        (loss * float("nan") if poison else loss).backward()
        lr = learning_rate(step, SCHEDULE, peak=OPTIMIZER.lr, total_steps=TOTAL_STEPS)
        _, applied = update_weights(
            self.model, self.optimizer, self.ema, clip_norm=OPTIMIZER.clip_norm, lr=lr, step=step
        )
        return applied

    def full(self) -> dict[str, torch.Tensor]:
        """Every tensor of the run in full."""
        tensors = training_state(self.model, self.optimizer, self.ema)
        return {name: read_full(tensor) for name, tensor in tensors.items()}

    def local_digest(self) -> str:
        """A hash of every bit that this process holds."""
        digest = hashlib.sha256()
        for name, tensor in training_state(self.model, self.optimizer, self.ema).items():
            digest.update(name.encode() + local_part(tensor).contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


def build_run(
    config: ParallelConfig | None = None,
    *,
    decay: float = 0.99,
    width: int = 8,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Run:
    """A fresh run in this process's group."""
    config = config or ParallelConfig()
    mesh = build_mesh(config, start_distributed(device, timeout_seconds=30))
    with torch.device("meta"):
        model = ToyModel(width=width)
    parallelize(model, mesh, config)
    materialize(model, mesh.device)
    init_toy(model, write_full)
    optimizer = build_optimizer(model, OPTIMIZER)
    return Run(mesh, model, optimizer, Ema(model, EmaConfig(decay=decay)))


def checkpointer_of(run: Run, folder: Path, **config) -> Checkpointer:
    """A checkpointer with the tests' defaults."""
    return Checkpointer(
        folder,
        CheckpointConfig(**({"timeout_seconds": 30} | config)),
        run.mesh,
        documents={"config.yaml": "toy: true\n"},
    )


def train(folder: Path, steps: int, every: int = 5, width: int = 8) -> str | None:
    """Trains up to `steps` updates, from where the folder is; the final digest, None if stopped."""
    stop = StopRequest()
    with ExitStack() as stack:
        run = build_run(width=width)
        stack.enter_context(hold_run_folder(folder))
        checkpointer = checkpointer_of(run, folder / "checkpoints", keep_last=2)
        stack.callback(checkpointer.close)
        extra = checkpointer.resume(run.model, run.optimizer, run.ema) or {"step": 0}
        skipped = SkippedUpdates(run.mesh.device, **extra.get("skipped", {}))
        start = extra["step"]
        metrics = MetricsLog(
            folder,
            MetricsConfig(tensorboard=False),
            is_writer=run.mesh.is_first,
            first_step=start,
        )
        stack.callback(metrics.close)

        def save(step: int) -> None:
            state = {"skipped": skipped.state_dict()}
            checkpointer.save(step, run.model, run.optimizer, run.ema, state)

        for step in range(start, steps):
            if stop.agreed():
                save(step)
                return None
            # One poisoned update: a resumed run must count it as often as the other.
            skipped.add(run.step(step, poison=step == 7 and run.mesh.rank == 0))
            metrics.log(step + 1, {"skipped": skipped.total})
            if (step + 1) % every == 0:
                save(step + 1)
        checkpointer.wait()
        return run.local_digest()


def train_or_exit(*args) -> None:
    """Trains as `train` does and leaves like a program that was stopped, if it was."""
    if train(*args) is None:
        sys.exit(STOPPED_EXIT_CODE)
