"""One run per folder: a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from longtake.parallel import run_together

LOCK_NAME = ".lock"


class FolderInUseError(RuntimeError):
    """Another run holds the folder."""


@contextmanager
def hold_run_folder(folder: Path) -> Iterator[None]:
    """Holds a run folder, made if need be, for this run; all processes call it, rank 0 takes the
    lock.

    Raises: FolderInUseError, on every process, naming host, process id and start of the run that
    has it.
    """
    held: list[int] = []

    def take() -> str | None:
        if dist.is_initialized() and dist.get_rank() > 0:
            return None
        try:
            held.append(_lock(folder))
        except FolderInUseError as error:
            return str(error)

    conflict = run_together(take)[0]
    if conflict is not None:
        raise FolderInUseError(conflict)
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _lock(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 4096).decode(errors="replace")
        os.close(descriptor)
        raise FolderInUseError(
            f"{folder} is in use by {_describe(holder)}: wait for it, stop it, or choose "
            "another folder"
        ) from None
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started})
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, holder.encode(), 0)
    return descriptor


def _describe(holder: str) -> str:
    try:
        fields = json.loads(holder)
        return f"process {fields['pid']} on {fields['host']}, started {fields['started']}"
    except (ValueError, KeyError, TypeError):
        return "another run that left no name"
