"""Encoding on many machines with Ray Data: it hands lists of work to processes all over a cluster,
each of which does with a list what `longtake encode` does with it anywhere.

Ray starts the processes, gives each a list and one more to come, and notices when one dies: another
gets its lists. What they make goes into the store's folder, which all machines see; through Ray
travel lists and counts. The only file that imports ray.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtake.data import Manifest
from longtake.store.board import Tally
from longtake.store.encoding import Encoding, Job
from longtake.store.plan import WorkList
from longtake.store.rates import Rate, Rates
from longtake.store.recipe import Recipe
from longtake.store.shards import KEY_DTYPE

log = logging.getLogger(__name__)

# Ray replaces dead workers for ever. A list is begun so often before it is taken to be what kills.
_MAX_STARTS = 4
_STARTS = ".starts"
_SHOWN = 3
# A worker has one list at hand and one in line.
_LISTS_PER_WORKER = 2
# Only lists and counts pass through Ray's memory, so a Ray of our own needs little.
_OBJECT_STORE_BYTES = 2**28


class ClusterError(RuntimeError):
    """A cluster that cannot be used, or a worker of one that failed."""


class Cluster:
    """A running Ray, and how many of our workers it has room for."""

    def __init__(self, job: Job, manifest: Manifest, *, address: str | None, workers: int) -> None:
        """Without an address the cluster of RAY_ADDRESS, or a Ray of this machine alone.

        Raises:
            ImportError: ray is not installed.
            ClusterError: there is no such cluster, or no room for a worker.
        """
        self.ray = _import_ray()
        self.job, self._digest = job, _digest(manifest)
        alone = address is None and not os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"address": address}
        if alone:
            options = {"object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
        try:
            self.ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = address or os.environ.get("RAY_ADDRESS") or "this machine"
            raise ClusterError(f"no Ray at {where}: {_brief(error)}") from error
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        self._gpus = int(any(node.get("GPU") for node in nodes))
        # Beside the encoder decode `num_workers` processes, or as many as a machine has room for.
        largest = max(int(node.get("CPU", 0)) for node in nodes)
        self._cpus = max(1, min(1 + job.data.num_workers, largest))
        room = sum(self._room(node) for node in nodes)
        if not room:
            raise ClusterError(
                f"no machine of the cluster has {self._cpus} CPUs"
                + (" and a GPU" if self._gpus else "")
                + " for a worker: use fewer --data.num-workers, or larger machines"
            )
        if workers > room:
            log.warning("--ray-workers %d: the cluster has room for %d", workers, room)
        self.num_workers = min(workers, room) if workers else room
        self._asked: Any = None
        self._recipe: dict[str, Any] | None = None

    def _room(self, node: dict[str, float]) -> int:
        """The workers that a machine can take."""
        by_cpus = int(node.get("CPU", 0)) // self._cpus
        return min(by_cpus, int(node.get("GPU", 0))) if self._gpus else by_cpus

    def close(self) -> None:
        """Leaves the cluster, or ends the Ray of this machine."""
        self.ray.shutdown()

    @property
    def what(self) -> str:
        machines = sum(node["Alive"] for node in self.ray.nodes())
        text = f"Ray: {machines} machine(s), {self.num_workers} worker(s) with {self._cpus} CPU(s)"
        return text + (" and a GPU each" if self._gpus else " each")

    def recipe(self) -> Recipe:
        """The recipe, as a worker makes it: this machine may be of another kind."""
        value = self._ask("recipe")
        self._recipe = json.loads(json.dumps(value))
        return Recipe.from_json(self._recipe)

    def measure(self, captions: Sequence[str]) -> Rates:
        """What encoding costs on a worker, see `measure_rates`."""
        rates = self._ask("measure", list(captions))
        return {(kind, bucket): Rate(*rate) for kind, bucket, *rate in rates}

    def _ask(self, what: str, *arguments: Any) -> Any:
        """One worker's answer to a question before the work begins."""
        if self._asked is None:
            remote = self.ray.remote(num_cpus=self._cpus, num_gpus=self._gpus)(_Worker)
            self._asked = remote.remote(self.job, self._digest, None)
        try:
            return self.ray.get(getattr(self._asked, what).remote(*arguments))
        except self.ray.exceptions.RayError as error:
            raise ClusterError(f"a worker of the cluster failed: {_brief(error)}") from error

    def encode(
        self, work: Sequence[WorkList], tally: Tally, *, share: int = 0, shares: int = 1
    ) -> None:
        """Does the lists; returns when all are done.

        Raises:
            ClusterError: a list's worker failed, or died more than a few times.
        """
        assert share == 0
        assert shares == 1, "one process hands out the lists"
        self._asked = None  # its place is wanted
        for starts in (self.job.store / "claims").glob(f"*{_STARTS}"):
            starts.unlink(missing_ok=True)  # of a run that was stopped
        data = self.ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        lists = data.from_items([_to_row(item) for item in work], override_num_blocks=len(work))
        results = lists.map(
            _Worker,
            fn_constructor_args=(self.job, self._digest, self._recipe),
            compute=data.ActorPoolStrategy(
                min_size=1,
                max_size=self.num_workers,
                initial_size=self.num_workers,
                max_tasks_in_flight_per_actor=_LISTS_PER_WORKER,
            ),
            num_cpus=self._cpus,
            num_gpus=self._gpus,
        )
        try:
            for row in results.iter_rows():
                _count(row, self.job.store, tally)
        except self.ray.exceptions.RayError as error:
            raise ClusterError(
                f"a worker of the cluster failed: {_brief(error)}. What was finished is kept: the "
                "same command goes on from there"
            ) from error


class _Worker:
    """A process on some machine of the cluster."""

    def __init__(self, job: Job, digest: str, recipe: dict[str, Any] | None) -> None:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoding = Encoding(job, device)
        if _digest(self.encoding.manifest) != digest:
            raise ValueError(
                f"{self.encoding.manifest.file} is another file on this machine than where the run "
                "was started: all machines must see the same manifest, clips and store"
            )
        own = json.loads(json.dumps(self.encoding.recipe.to_json()))
        if recipe is not None and own != recipe:
            different = [key for key in own if own[key] != recipe[key]]
            raise ValueError(
                f"the encoders of this machine ({device}) make other latents than those of the "
                f"worker that was asked first: they differ in {', '.join(different)}. Set "
                "video_encoder.dtype and text_encoder.dtype, and use machines of one kind"
            )

    def recipe(self) -> dict[str, Any]:
        return self.encoding.recipe.to_json()

    def measure(self, captions: list[str]) -> list[tuple[str, int, float, float]]:
        rates = self.encoding.measure(captions)
        return [(*group, rate.seconds, rate.num_bytes) for group, rate in rates.items()]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Does one list."""
        item = _from_row(row)
        tally = Tally(total=item.num_items)
        with _counted_start(self.encoding, item):
            self.encoding.encode([item], tally)
        return {
            "items": item.num_items,
            "bytes": tally.bytes_written,
            "reasons": json.dumps(tally.reasons),
            "encoded": json.dumps([[*group, *spent] for group, spent in tally.encoded.items()]),
        }


@contextmanager
def _counted_start(encoding: Encoding, item: WorkList) -> Iterator[None]:
    """Notes in the store's folder that a list was begun, until it is done or fails.

    Raises:
        ClusterError: it was begun before, several times, and nobody came back.
    """
    path = encoding.job.store / "claims" / f"{item.kind}-{item.name}{_STARTS}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        before = file.tell()
        file.write(b".")
    if before >= _MAX_STARTS:
        path.unlink(missing_ok=True)
        paths = [encoding.manifest[k].path for k in item.sample_ids[:_SHOWN].tolist()]
        what = "captions" if item.kind == "text" else "clips"
        raise ClusterError(
            f"{before} workers have died over one list: {what} of {len(item.sample_ids)} samples "
            f"({', '.join(paths)}, ...). Out of memory? Fewer --data.num-workers, smaller "
            "--shard-mib or larger machines may help"
        )
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _count(row: dict[str, Any], store: Path, tally: Tally) -> None:
    """Adds what became of a list to what the run has done."""
    tally.done += row["items"]
    tally.bytes_written += row["bytes"]
    tally.reasons.update(Counter(json.loads(row["reasons"])))
    for kind, bucket, count, seconds in json.loads(row["encoded"]):
        before = tally.encoded.get((kind, bucket), (0, 0.0))
        tally.encoded[kind, bucket] = (before[0] + count, before[1] + seconds)
    tally.on_change(tally)


def _to_row(item: WorkList) -> dict[str, Any]:
    return {
        "kind": item.kind,
        "name": item.name,
        "bucket": item.bucket,
        "variants": item.missing.shape[1],
        "sample_ids": item.sample_ids.tobytes(),
        "missing": item.missing.tobytes(),
        "keys": item.keys.tobytes(),
    }


def _from_row(row: dict[str, Any]) -> WorkList:
    shape = (-1, row["variants"])
    return WorkList(
        kind=row["kind"],
        name=row["name"],
        bucket=row["bucket"],
        sample_ids=np.frombuffer(row["sample_ids"], np.int64),
        missing=np.frombuffer(row["missing"], bool).reshape(shape),
        keys=np.frombuffer(row["keys"], KEY_DTYPE).reshape(shape),
    )


def _digest(manifest: Manifest) -> str:
    with open(manifest.file, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _brief(error: BaseException) -> str:
    """What went wrong inside, in a line: Ray puts a traceback of every machine around it."""
    cause = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no reason given'}"[:500]


def _import_ray() -> Any:
    # Nothing of a run is anybody's business: Ray asks before it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            f"--engine ray needs Ray Data ({error}): pip install 'longtake[ray]'"
        ) from error
    return ray
