"""Who encodes what: a locked file for each list of work, let go by the system when its holder dies.

Claims only keep two processes from doing the same work. Where a file system has no locks, or not
between machines, work is done twice and nothing worse happens: shards are written under other names
and renamed, and the same content has the same key.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class Claim:
    """Held until released, or until this process ends."""

    path: Path
    descriptor: int

    def release(self) -> None:
        # Removed while still held: whoever opened it meanwhile will notice that it has no name.
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def take_claim(store: Path, name: str) -> Claim | None:
    """A claim on work of this name; None while another process has it."""
    folder = store / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            # Not flock: data workers inherit its locks and outlive this process by seconds.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            log.warning("%s has no file locks: other processes may do the same work", folder)
            return Claim(path, descriptor)
        try:
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return Claim(path, descriptor)
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its holder has just removed it: try again with a new one


@contextmanager
def wait_for_claim(store: Path, name: str) -> Iterator[None]:
    """Holds a claim, once whoever has it lets it go."""
    while (claim := take_claim(store, name)) is None:
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        claim.release()
