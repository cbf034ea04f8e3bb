"""Latent stores made by `longtake encode` on clips made on the fly, and ways to disturb it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from longtake import cli
from longtake.config import RunConfig, TrainConfig
from longtake.data import Bucket
from longtake.encoders import TextEncoderConfig, VideoEncoderConfig
from longtake.encoders.dct import DctEncoder
from longtake.training import CheckpointConfig
from tests.data.media import make_video
from tests.programs.conftest import TINY_VAE
from tests.programs.runs import save_config, tiny_config, write_manifest

SIDE = 32
# One sample a shard: 24 channels of 4 x 4 x 4 latents in bf16, 3 KiB.
ONE_SAMPLE = ("--shard-mib", "0.003")


def make_many_clips(folder: Path, count: int, *, num_frames: int = 6) -> Path:
    """Clips of noise that moves, each with a caption; the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        picture = random.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        frames = [np.roll(picture, 3 * moment, axis=1) for moment in range(num_frames)]
        make_video(folder / f"{number}.mp4", num_frames, size=(SIDE, SIDE), frames_HWC=frames)
        caption = " ".join(["word"] * (number % 5) + [f"number {number}"])
        rows.append({"path": f"{number}.mp4", "caption": caption, "label": number % 3})
    return write_manifest(folder / "many.jsonl", rows)


def real_encoders_config(folder: Path, *, clips: int, steps: int) -> RunConfig:
    """A run with real encoder classes, tiny and random: an AutoencoderKL and T5, both in bf16; two
    buckets, two places, both sides."""
    manifest = make_many_clips(folder / "clips", clips, num_frames=9)
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text(json.dumps(TINY_VAE))
    config = tiny_config(folder, manifest, train=TrainConfig(steps=steps, log_every_steps=1))
    buckets = (
        Bucket(num_frames=4, height=SIDE, width=SIDE, batch_size=4),
        Bucket(num_frames=1, height=SIDE // 2, width=SIDE, batch_size=4),
    )
    return replace(
        config,
        model=replace(config.model, in_channels=4, caption_channels=64, max_caption_tokens=12),
        data=replace(config.data, buckets=buckets, flip=True, clip_places=2),
        video_encoder=VideoEncoderConfig(
            kind="diffusers", path=str(folder / "vae"), weights="random", dtype="bf16"
        ),
        text_encoder=TextEncoderConfig(
            kind="t5", path="tiny", weights="random", dtype="bf16", max_tokens=12
        ),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=0),
    )


def encode_here(config: RunConfig, store: Path, *arguments: object) -> int:
    """`longtake encode` in this process."""
    texts = ["--config", str(save_config(config)), "--output", str(store), *map(str, arguments)]
    return cli.main(["encode", *texts])


def encode_slowly(path: Path, store: Path, arguments: list[str], seconds: float) -> int:
    """`longtake encode` whose video encoder takes its time, for a process of its own; how many
    clips it has encoded."""
    encode, count = DctEncoder.encode, 0

    def wait(self: DctEncoder, pixels_BCTHW: Tensor) -> Any:
        nonlocal count
        time.sleep(seconds)
        count += len(pixels_BCTHW)
        return encode(self, pixels_BCTHW)

    DctEncoder.encode = wait  # type: ignore[method-assign]
    status = cli.main(["encode", "--config", str(path), "--output", str(store), *arguments])
    assert status == 0
    return count


def encode_and_crash(path: Path, store: Path, arguments: list[str], crash_at: int) -> None:
    """`longtake encode` that ends, as by a power cut, before its n-th change to the disk."""
    changes = 0

    def counted(change: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal changes
            changes += 1
            if changes == crash_at:
                os._exit(9)
            return change(*args, **kwargs)

        return call

    for name in ("mkdir", "rename", "replace", "fsync", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    status = cli.main(["encode", "--config", str(path), "--output", str(store), *arguments])
    assert status == 0


def files_of(store: Path) -> dict[str, bytes]:
    """Every file of a store, whatever its purpose."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }
