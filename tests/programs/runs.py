"""Tiny runs on clips made on the fly, started as a user starts them, each in a real process."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict_loader import load

from longtake import cli
from longtake.config import RunConfig, SamplingConfig, TrainConfig, dump_yaml
from longtake.data import Bucket, DataConfig
from longtake.diffusion import DiffusionConfig, SamplerConfig
from longtake.encoders import TextEncoderConfig
from longtake.models import ModelConfig
from longtake.training import (
    CheckpointConfig,
    EmaConfig,
    MetricsConfig,
    OptimizerConfig,
    find_checkpoint,
    read_metrics,
)
from longtake.training.checkpoint_folder import read_manifest
from longtake.training.safe_reading import SafePlanner, SafeReader
from tests.data.media import make_video
from tests.processes import Processes, run_in_processes

SIDE = 32
NUM_FRAMES = 10
NUM_CLIPS = 3


def make_clips(folder: Path) -> Path:
    """Three clips of a square that moves to the right, with captions and labels; the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(NUM_CLIPS):
        frames = []
        for moment in range(NUM_FRAMES):
            frame = np.full((SIDE, SIDE, 3), 30 + 40 * index, np.uint8)
            top, left = 2 + 8 * index, 2 * moment
            frame[top : top + 10, left : left + 10] = (220, 60 + 60 * index, 30)
            frames.append(frame)
        name = f"clip{index}.mp4"
        make_video(folder / name, NUM_FRAMES, size=(SIDE, SIDE), frames_HWC=frames)
        rows.append({"path": name, "caption": f"a square in row {index}", "label": index})
    return write_manifest(folder / "train.jsonl", rows)


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_config(folder: Path, manifest: Path, **changes: Any) -> RunConfig:
    """A text-conditioned flow STDiT of one narrow block, in `folder`/runs."""
    config = RunConfig(
        name="tiny",
        output=str(folder / "runs"),
        model=ModelConfig(
            name="stdit",
            size="tiny",
            depth=1,
            hidden_size=32,
            num_heads=2,
            in_channels=24,
            learn_sigma=False,
            caption_channels=16,
            max_caption_tokens=8,
        ),
        diffusion=DiffusionConfig(objective="flow"),
        data=DataConfig(
            manifest=str(manifest),
            buckets=(Bucket(num_frames=4, height=SIDE, width=SIDE, batch_size=4),),
            num_workers=0,
        ),
        text_encoder=TextEncoderConfig(kind="hashed-words", channels=16, max_tokens=8),
        train=TrainConfig(steps=4, log_every_steps=1),
        optimizer=OptimizerConfig(lr=3e-3),
        ema=EmaConfig(decay=0.9),
        sampling=SamplingConfig(sampler=SamplerConfig(name="euler", steps=2, guidance_scale=2.0)),
        checkpoint=CheckpointConfig(every_steps=4, keep_last=0),
        metrics=MetricsConfig(tensorboard=False),
    )
    return replace(config, **changes)


def labelled(config: RunConfig, name: str = "dit", **sampling: Any) -> RunConfig:
    """The same run with a model conditioned on labels, trained as IDDPM."""
    return replace(
        config,
        model=replace(config.model, name=name, learn_sigma=True, num_classes=NUM_CLIPS),
        diffusion=DiffusionConfig(objective="iddpm"),
        text_encoder=TextEncoderConfig(kind="none"),
        sampling=SamplingConfig(
            labels=(0, 2), sampler=SamplerConfig(name="ddim", steps=2, guidance_scale=2.0)
        ),
    )


def save_config(config: RunConfig) -> Path:
    """The config as a file, for the command line."""
    path = Path(config.output).parent / f"{config.name}.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str
    batches: dict[int, list[tuple[int, int]]]
    """What was trained in each step: (epoch, sample id), as this process saw it."""


def longtake(*arguments: object, **options: Any) -> Outcome:
    """One command in one new process; it must not be killed."""
    return longtake_in(1, *arguments, **options)[0]


def longtake_in(world_size: int, *arguments: object, **options: Any) -> list[Outcome]:
    """One command in several processes, as under torchrun; outcomes by rank."""
    texts = [str(argument) for argument in arguments]
    return run_in_processes(_run, world_size, texts, options, timeout_seconds=120)


def train(config: RunConfig, *arguments: str, **options: Any) -> Outcome:
    """`longtake train` on a config, which must succeed."""
    outcome = longtake("train", "--config", save_config(config), *arguments, **options)
    assert outcome.status == 0, outcome.err
    return outcome


def train_until_killed(config: RunConfig, step: int) -> None:
    """`longtake train`, killed with SIGKILL in the middle of a step."""
    arguments = ["train", "--config", str(save_config(config))]
    options = {"signal_at": (step, int(signal.SIGKILL))}
    with Processes(_run, 1, arguments, options) as processes:
        assert processes.exit_codes(120) == [-signal.SIGKILL]


def _run(arguments: list[str], options: dict[str, Any]) -> Outcome:
    from longtake.programs import train as program

    # Daemons, which the tests' processes are, may not have data workers.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    out, err, batches, loaders = StringIO(), StringIO(), {}, []
    build_loader, encode_batch = program.build_loader, program.encode_batch

    def note_loader(*args: Any, **kwargs: Any) -> Any:
        loaders.append(build_loader(*args, **kwargs))
        return loaders[-1]

    def note_batch(batch: Any, **kwargs: Any) -> Any:
        step = loaders[-1].state.step
        keys = zip(batch.epochs_B.tolist(), batch.sample_ids_B.tolist(), strict=True)
        batches.setdefault(step, []).extend(keys)
        if step == options.get("workers_stopped_at"):
            # From outside: a worker takes a signal of its parent for an order to end.
            workers = [str(worker.pid) for worker in multiprocessing.active_children()]
            subprocess.run(["kill", "-TERM", *workers], check=bool(workers))
        at, number = options.get("signal_at", (-1, 0))
        if step == at and options.get("signal_rank", 0) == int(os.environ["RANK"]):
            del options["signal_at"]
            os.kill(os.getpid(), number)
        return encode_batch(batch, **kwargs)

    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.object(program, "build_loader", note_loader),
        mock.patch.object(program, "encode_batch", note_batch),
    ):
        if before := options.get("before"):
            before()
        try:
            status = cli.main(arguments)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
            status = -1
    return Outcome(status, out.getvalue(), err.getvalue(), batches)


def run_folder(config: RunConfig) -> Path:
    return Path(config.output) / config.name


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The metrics' lines without those that time decides."""
    return [
        {
            key: value
            for key, value in line.items()
            if key != "time" and not key.startswith(("speed/", "memory/"))
        }
        for line in read_metrics(folder)
    ]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step."""
    lines = read_metrics(folder)
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def read_tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, or of a run's newest: weights, moments, averages."""
    folder = find_checkpoint(run)
    sizes = {name: entry["size"] for name, entry in read_manifest(folder)["files"].items()}
    reader = SafeReader(folder, sizes)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.metadata.state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(tensors, storage_reader=reader, planner=SafePlanner(), no_dist=True)
    return tensors


def assert_same_bits(first: Path, second: Path) -> None:
    one, other = read_tensors(first), read_tensors(second)
    assert one.keys() == other.keys()
    assert {name.split(".")[0] for name in one} == {"model", "optimizer", "ema"}
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def python_m_longtake(*arguments: object) -> list[str]:
    """The command line of a real interpreter."""
    return [sys.executable, "-m", "longtake", *map(str, arguments)]
