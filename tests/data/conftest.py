from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.data.media import make_video, write_jsonl


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five videos of 24 frames, v0.mp4 ... v4.mp4, listed in `manifest.jsonl`."""
    folder = tmp_path_factory.mktemp("videos")
    for index in range(5):
        make_video(folder / f"v{index}.mp4", 24)
    rows: list[dict[str, object]] = [
        {"path": f"v{index}.mp4", "caption": f"clip {index}", "label": index} for index in range(5)
    ]
    write_jsonl(folder / "manifest.jsonl", rows)
    return folder
