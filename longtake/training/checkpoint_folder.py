"""A checkpoint on disk: a folder that is complete or absent, and knows the size and checksum of
each file.

`step-N.tmp` is being written, `step-N` is complete, `step-N.deleting` is on its way out,
`step-N.damaged` was found damaged and set aside. The manifest is written last, and the rename makes
the folder exist.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not fit what should be loaded from it."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's files are not what was written."""


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step}"


def steps_saved(root: Path) -> list[int]:
    """The steps whose checkpoints exist, newest first; nothing is verified."""
    if not root.is_dir():
        return []
    matches = (re.fullmatch(r"step-(\d+)", entry.name) for entry in root.iterdir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def latest(root: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written; logs those it passes over."""
    for step in steps_saved(root):
        folder = step_folder(root, step)
        problems = find_damage(folder)
        if not problems:
            return folder
        log.error("%s is damaged and passed over: %s", folder, "; ".join(problems))
    return None


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of files: a CRC finds every flipped bit, though not a forger."""
    return {name: _describe_file(folder / name) for name in names}


def write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """Writes the manifest, the last file of a checkpoint, to the disk itself."""
    document = {"crc32": _body_crc(body), "manifest": body}
    write_durably(folder / MANIFEST, json.dumps(document, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's body.

    Raises: DamagedCheckpointError if it is missing, damaged or names files outside of the folder;
    CheckpointError if it is of a newer format.
    """
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        body = document["manifest"]
        if document["crc32"] != _body_crc(body):
            raise DamagedCheckpointError(f"{path} does not have the checksum it should have")
        files, version = body["files"], body["format"]
        named_well = all(re.fullmatch(r"[\w.-]+", name) and name != ".." for name in files)
        described_well = all(set(entry) == {"size", "crc32"} for entry in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is missing or not readable ({error})") from error
    if not named_well or not described_well:
        raise DamagedCheckpointError(f"{path} names files that no checkpoint has")
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}, this version reads {FORMAT}: use the "
            "longtake that wrote it"
        )
    return body


def find_damage(folder: Path, *, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, as texts naming them; with `shares`, of every n-th
    file only."""
    try:
        files = read_manifest(folder)["files"]
    except DamagedCheckpointError as error:
        return [str(error)]
    problems = []
    for name in sorted(files)[share::shares]:
        path, expected = folder / name, files[name]
        try:
            found = _describe_file(path)
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror})")
            continue
        if found["size"] != expected["size"]:
            problems.append(f"{path} has {found['size']} bytes instead of {expected['size']}")
        elif found != expected:
            problems.append(f"{path} does not have the checksum it was written with")
    return problems


def commit(temporary: Path, final: Path) -> None:
    """Makes a finished temporary folder the checkpoint, durably and at once."""
    if final.exists():
        raise CheckpointError(
            f"{final} exists already: resume from it, or give this run a folder of its own"
        )
    fsync_folder(temporary)
    temporary.rename(final)
    fsync_folder(final.parent)


def prune(root: Path, keep_last: int) -> None:
    """Deletes all but the newest checkpoints; one that is being read stays until the next time."""
    if keep_last <= 0:
        return
    for step in steps_saved(root)[keep_last:]:
        folder = step_folder(root, step)
        try:
            with (folder / MANIFEST).open("rb") as manifest:
                fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _delete(folder)
        except BlockingIOError:
            log.info("%s is being read and kept for now", folder)
        except OSError as error:
            log.warning("%s could not be deleted: %s", folder, error)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Within the context no run deletes this checkpoint."""
    with (folder / MANIFEST).open("rb") as manifest:
        with suppress(OSError):  # a file system without locks: then nobody is kept from deleting
            fcntl.flock(manifest, fcntl.LOCK_SH)
        yield


def remove_leftovers(root: Path) -> None:
    """Removes what a run that was killed left half written or half deleted. Hold the run folder for
    it."""
    for entry in root.glob("step-*"):
        if re.fullmatch(r"step-\d+\.(tmp|deleting)", entry.name):
            log.warning("removing %s, left by a run that was interrupted", entry)
            shutil.rmtree(entry)


def set_aside(folder: Path) -> None:
    """Renames a damaged checkpoint, so that it is no candidate any more and its step can be saved
    again."""
    number, target = 1, folder.with_name(folder.name + ".damaged")
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.damaged-{number}")
    folder.rename(target)
    fsync_folder(folder.parent)


def write_durably(path: Path, text: str) -> None:
    """Writes a new text file through to the disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Writes a folder's entries, new names and renames, through to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(folder: Path) -> None:
    # Renamed first: a deletion that is interrupted must not leave half a checkpoint under its name.
    doomed = folder.with_name(folder.name + ".deleting")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _describe_file(path: Path) -> dict[str, int]:
    # A link could lead outside of the folder, and a pipe would block for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "not a regular file")
        size = crc = 0
        while chunk := file.read(_CHUNK_BYTES):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return {"size": size, "crc32": crc}


def _body_crc(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
