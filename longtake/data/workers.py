"""Running a reader in worker processes; when one dies or hangs, the file it read is named."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from longtake.data.reader import Reader

_STOP_GRACE_SECONDS = 20


class LoaderError(RuntimeError):
    """A worker process died or hangs."""

    def __init__(self, text: str, sample_ids: Sequence[int]) -> None:
        super().__init__(text)
        self.sample_ids = tuple(sample_ids)
        """What such workers were reading, longest first."""


def run_workers(reader: Reader, requests: Iterator[Any], *, pin_memory: bool) -> Iterator[Any]:
    """What `reader` makes of each request, in order.

    Raises:
        LoaderError: a worker died or took too long.
    """
    config = reader.config
    parallel: dict[str, Any] = {}
    if config.num_workers:
        parallel = {
            "num_workers": config.num_workers,
            "prefetch_factor": config.prefetch_batches,
            "timeout": config.worker_timeout_seconds,
            "worker_init_fn": _outlive_a_stop,
        }
    loader = DataLoader(
        reader,
        sampler=requests,
        batch_size=None,
        pin_memory=pin_memory,
        # Its own generator: starting workers would otherwise draw from the global one.
        generator=torch.Generator(),
        **parallel,
    )
    # One pass over the requests is the whole life of the workers, so they need not be persistent.
    results = iter(loader)
    while True:
        try:
            result = next(results)
        except StopIteration:
            return
        except RuntimeError as error:
            raise _blame(error, reader) from error
        yield result


def _outlive_a_stop(worker: int) -> None:
    """A scheduler or a terminal that stops a run signals all its processes. The one that trains
    still wants batches until it has saved, so a worker ends only some time later."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_STOP_GRACE_SECONDS))


def _blame(error: RuntimeError, reader: Reader) -> RuntimeError:
    """A LoaderError that names the file if the error is about a worker; else the error itself."""
    text = str(error)
    if match := re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(.*)", text):
        process_ids = {int(number) for number in match[1].split(",")}
        sample_ids, doing = _doing(reader, process_ids)
        return LoaderError(
            f"data worker (process {match[1]}){match[2].rstrip('.')} while reading "
            f"{doing or 'nothing (between two samples)'}. "
            "A file that crashes the decoder should be removed from the manifest; if the system "
            "ran out of memory, use fewer num_workers or prefetch_batches",
            sample_ids,
        )
    if "timed out after" in text:
        seconds = reader.config.worker_timeout_seconds
        sample_ids, doing = _doing(reader)
        return LoaderError(
            f"no batch from the data workers for worker_timeout_seconds={seconds:g}; they are "
            f"reading {doing or 'nothing (waiting for a worker to start?)'}. "
            "Is the disk reachable? Raise the timeout if files are only slow",
            sample_ids[:1],
        )
    return error


def _doing(reader: Reader, process_ids: set[int] | None = None) -> tuple[list[int], str]:
    """What the given workers (or all) read at this moment and since when, longest first."""
    now = time.monotonic_ns() // 1_000_000
    rows = [
        (process_id, sample_id, since)
        for process_id, sample_id, since in sorted(reader.doing.tolist(), key=lambda row: row[2])
        if sample_id >= 0 and (process_ids is None or process_id in process_ids)
    ]
    texts = (
        f"{reader.manifest[sample_id].path!r} (process {process_id}, {(now - since) / 1000:.1f} s)"
        for process_id, sample_id, since in rows
    )
    return [sample_id for _, sample_id, _ in rows], ", ".join(texts)
