"""Latent stores made by `longtake encode` on clips made on the fly, and ways to disturb it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from longtake import cli
from longtake.config import RunConfig
from longtake.encoders.dct import DctEncoder
from tests.data.media import make_video
from tests.programs.runs import save_config, write_manifest

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
