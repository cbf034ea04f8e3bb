"""Opening files that somebody else named: inside a root, regular files only, never blocking."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, Literal, get_args

Reason = Literal[
    "bad_name",  # the name itself is refused
    "outside_root",
    "missing",
    "not_a_file",  # a folder, FIFO, device or socket
    "unreadable",  # the system or the decoder refuses it, or it is not media of an allowed kind
    "empty",
    "no_video",
    "too_short",
    "too_large",
    "too_slow",
    "corrupt",
    "unsupported",
    "not_finite",  # an encoder makes infinities of it, or no numbers at all
]
REASONS: tuple[str, ...] = get_args(Reason)


class MediaError(Exception):
    """A file that cannot be used, with a reason code for counting and a text for people."""

    def __init__(self, path: str | os.PathLike[str], reason: Reason, text: str) -> None:
        super().__init__(str(path), reason, text)
        self.path = str(path)
        self.reason: Reason = reason
        self.text = text

    def __str__(self) -> str:
        return f"{self.path}: {self.text} [{self.reason}]"


def name_problem(name: str, *, allow_outside_root: bool = False) -> str | None:
    """What is wrong with a path from a manifest, or None; looks at the text, not at the disk."""
    if not name:
        return "the path is empty"
    if not name.isprintable():
        return f"the path {name!a} has control or unprintable characters"
    if "\\" in name:
        return f"the path {name!r} has a backslash: use forward slashes"
    if len(name) > 4096:
        return f"the path is {len(name)} characters long, more than any file system takes"
    if not allow_outside_root and (name.startswith("/") or ".." in name.split("/")):
        return (
            f"the path {name!r} leaves the root folder: "
            "make it relative, set root=..., or set allow_outside_root=True"
        )
    return None


def locate(root: Path, name: str, *, allow_outside_root: bool = False) -> Path:
    """The real path of `name` under `root`, symbolic links followed.

    Raises:
        MediaError: the name is refused, or the file it leads to lies outside the root.
    """
    problem = name_problem(name, allow_outside_root=allow_outside_root)
    if problem is not None:
        raise MediaError(name, "bad_name", problem)
    try:
        real = (root / name).resolve()
        real_root = root.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # loops of links, names too long
        raise MediaError(name, "unreadable", f"cannot be resolved ({error})") from error
    if not allow_outside_root and not real.is_relative_to(real_root):
        text = (
            f"leads to {real}, outside the root folder {real_root}: "
            "set root=... or allow_outside_root=True"
        )
        raise MediaError(name, "outside_root", text)
    return real


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading; a FIFO or a device is refused instead of waited for.

    Raises:
        MediaError: missing, not a regular file, empty or not readable.
    """
    try:
        # O_NONBLOCK: opening a FIFO without a writer would otherwise wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise MediaError(path, "missing", "no such file") from error
    except (OSError, ValueError) as error:
        is_odd = getattr(error, "errno", None) in _NOT_FILES
        reason: Reason = "not_a_file" if is_odd else "unreadable"
        raise MediaError(path, reason, f"cannot be opened ({error})") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise MediaError(path, "not_a_file", f"is {kind}, not a regular file")
    if status.st_size == 0:
        os.close(descriptor)
        raise MediaError(path, "empty", "the file is empty (0 bytes)")
    return os.fdopen(descriptor, "rb")


# ENXIO: a socket or a device without a driver; ENODEV, EISDIR.
_NOT_FILES = {6, 19, 21}
