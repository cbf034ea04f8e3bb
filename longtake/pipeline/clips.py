"""Generated and real clips as files: mp4 for videos, PNG for images, captions beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from longtake.data import write_image, write_video


def write_clips(
    folder: Path,
    videos_BCTHW: Tensor,
    captions: Sequence[str],
    *,
    fps: float,
    with_random_encoders: bool = False,
) -> list[Path]:
    """Write uint8 videos (B, 3, T, H, W) as `000.mp4` or `000.png` ..., and `captions.json`.

    Clips that were made with untrained encoders say so there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, video_CTHW in enumerate(videos_BCTHW.cpu()):
        if video_CTHW.shape[1] == 1:
            paths.append(folder / f"{index:03}.png")
            write_image(paths[-1], video_CTHW[:, 0])
        else:
            paths.append(folder / f"{index:03}.mp4")
            write_video(paths[-1], video_CTHW.transpose(0, 1), fps)
    listing = {path.name: caption for path, caption in zip(paths, captions, strict=True)}
    if with_random_encoders:
        listing["warning"] = "made with random encoder weights: these clips mean nothing"
    text = json.dumps(listing, indent=1, ensure_ascii=False)
    (folder / "captions.json").write_text(text, encoding="utf-8")
    return paths
