"""A store on object storage, through fsspec: header and index are fetched once, entries are read by
range requests. Only reading: a store is filled on a file system, and copied."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from longtake.store.index import HEADER, read_store_header
from longtake.store.tensor_file import StoreError

_MAX_HEADER_BYTES = 64 * 2**20


def is_url(path: str | Path) -> bool:
    """Whether a store is named by a URL, such as s3://bucket/store."""
    return "://" in str(path)


class RemoteStore:
    """A store's files behind a URL, whose protocol fsspec has a package for."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opened: tuple[int, Any, str] | None = None  # process, file system, path there

    def fetch(self) -> Path:
        """A local folder, gone when this process ends, with the store's header and index.

        Raises:
            StoreError: there is no such store, or it cannot be reached.
            ImportError: the protocol's package is missing.
        """
        folder = Path(tempfile.mkdtemp(prefix="longtake-store-"))
        atexit.register(_remove, folder, os.getpid())
        (folder / HEADER).write_bytes(self._read_whole(HEADER, _MAX_HEADER_BYTES))
        name = read_store_header(folder)["index"]
        file_system, root = self._open()
        try:
            file_system.get_file(f"{root}/{name}", str(folder / name))
        except Exception as error:  # every protocol's package has errors of its own
            raise self._unreachable(name, error) from error
        return folder

    def read(self, name: str, begin: int, size: int) -> bytes:
        """Some bytes of a file; fewer at its end.

        Raises:
            StoreError: they cannot be had.
        """
        file_system, root = self._open()
        try:
            return file_system.cat_file(f"{root}/{name}", start=begin, end=begin + size)
        except Exception as error:
            raise self._unreachable(name, error) from error

    def _read_whole(self, name: str, limit: int) -> bytes:
        return self.read(name, 0, limit)

    def _unreachable(self, name: str, error: Exception) -> StoreError:
        return StoreError(
            None, f"{self.url}/{name} cannot be read ({type(error).__name__}: {error!s:.200})"
        )

    def _open(self) -> tuple[Any, str]:
        """The file system, of this process's own: connections do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec

            protocol = self.url.partition("://")[0]
            try:
                file_system, path = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
            except ImportError as error:
                raise ImportError(
                    f"{self.url} needs another package ({error}): pip install the one it names"
                ) from error
            except ValueError as error:
                raise StoreError(None, f"{self.url}: no protocol {protocol!r} ({error})") from error
            self._opened = os.getpid(), file_system, path
        return self._opened[1], self._opened[2]


def _remove(folder: Path, process_id: int) -> None:
    # Data workers are forked with this in their list.
    if os.getpid() == process_id:
        shutil.rmtree(folder, ignore_errors=True)
