"""Checkpoints of a whole run: saved while training goes on, complete or absent, readable by any
number of processes.

A save copies this process's shards to host memory and returns; a thread writes them with PyTorch's
distributed checkpointing, checksums them, and rank 0 makes the folder exist (`checkpoint_folder`).
Everything in a checkpoint is either a tensor under a flat name, `model.*`, `optimizer.*`, `ema.*`,
or JSON in the manifest.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import longtake
from longtake.parallel import Mesh, drop_gathered, gather_json, local_part, run_together
from longtake.training import checkpoint_folder
from longtake.training.checkpoint_folder import CheckpointError, step_folder
from longtake.training.ema import Ema
from longtake.training.safe_reading import SafePlanner, SafeReader, check_fits

log = logging.getLogger(__name__)

_SPACE_MARGIN = 1.02


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and how many are kept."""

    every_steps: int = 1000
    keep_last: int = 3
    """Older checkpoints are deleted; 0 keeps all."""
    in_background: bool = True
    """Write while training goes on. False makes each save wait for the disk."""
    on_error: Literal["stop", "warn"] = "stop"
    """What a failed save does to the run, at the next save or at the end; the last good one is
    untouched."""
    timeout_seconds: int = 1800
    """How long processes wait for one another's files."""

    def __post_init__(self) -> None:
        for name, least in (("every_steps", 1), ("keep_last", 0), ("timeout_seconds", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"checkpoint.{name}={getattr(self, name)} must be at least {least}"
                )


class Checkpointer:
    """Saves and restores a run in one folder, which the run must hold (`hold_run_folder`).

    All processes make it and call its methods in the same order. `documents` are texts put into
    every checkpoint under their file names: the resolved config, what ran.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        mesh: Mesh,
        *,
        documents: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self._config = config
        self._mesh = mesh
        self._documents = dict(documents or {})
        # Of its own: the writing thread must not mix its messages with those of the training.
        timeout = timedelta(seconds=config.timeout_seconds)
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._host_copies = _HostCopies(mesh.device)
        self._writer = ThreadPoolExecutor(1, "checkpoint", initializer=self._start_writer)
        self._in_flight: Future[None] | None = None

        def prepare() -> None:
            if mesh.is_first:
                folder.mkdir(parents=True, exist_ok=True)
                checkpoint_folder.remove_leftovers(folder)

        run_together(prepare, self._group)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        ema: Ema | None,
        extra: Mapping[str, Any],
    ) -> None:
        """Saves everything as it is after `step` updates; `extra` is JSON-able and comes back from
        `resume`.

        Waits for the save before, if that is still being written.

        Raises: CheckpointError of the save before, if it failed and on_error is "stop".
        """
        self.wait()
        tensors = training_state(model, optimizer, ema)
        self._host_copies.take(tensors)
        self._in_flight = self._writer.submit(self._write, step, tensors, {"step": step, **extra})
        if not self._config.in_background:
            self.wait()

    def wait(self) -> None:
        """Waits until the save in flight, if any, is on the disk.

        Raises: CheckpointError, on all processes, if it failed and on_error is "stop".
        """
        job, self._in_flight = self._in_flight, None
        if job is None:
            return
        try:
            job.result()
        except Exception as error:
            if self._config.on_error == "stop":
                raise CheckpointError(f"the last checkpoint was not saved: {error}") from error

    def close(self) -> None:
        """Waits for the save in flight and ends the writer. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def resume(
        self, model: nn.Module, optimizer: torch.optim.AdamW, ema: Ema | None
    ) -> dict[str, Any] | None:
        """Restores the newest checkpoint that is as it was written; returns its `extra` with its
        "step".

        None if there is no checkpoint. A damaged one is logged with its files and set aside in
        favour of the one before. Works with any number of processes, whatever number saved it.

        Raises: CheckpointError if all are damaged, or if the checkpoint does not fit the model:
        then no tensor has been touched.
        """
        steps = run_together(lambda: checkpoint_folder.steps_saved(self.folder), self._group)[0]
        damaged: list[Path] = []
        for step in steps:
            folder = step_folder(self.folder, step)
            if problems := self._find_damage(folder):
                log.error("%s is damaged, trying the one before: %s", folder, "; ".join(problems))
                damaged.append(folder)
                continue
            extra = self._restore(folder, training_state(model, optimizer, ema))
            # Gathered copies of the old weights must not be used again.
            drop_gathered(model)
            run_together(lambda: self._set_aside(damaged), self._group)
            log.info("resumed from %s", folder)
            return extra
        if damaged:
            raise CheckpointError(
                f"all checkpoints in {self.folder} are damaged ({len(damaged)}): restore one "
                "from a copy, or start in another folder"
            )
        return None

    def _find_damage(self, folder: Path) -> list[str]:
        """Every process verifies its share of the files."""
        rank, world_size = self._mesh.rank, self._mesh.world_size
        found = checkpoint_folder.find_damage(folder, share=rank, shares=world_size)
        return sorted({text for texts in gather_json(found, self._group) for text in texts})

    def _restore(self, folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        with checkpoint_folder.reading(folder):
            manifest = checkpoint_folder.read_manifest(folder)
            reader = _open_reader(folder, manifest)
            check_fits(reader.metadata, tensors, folder)
            load(tensors, storage_reader=reader, planner=SafePlanner(), process_group=self._group)
        return manifest["extra"]

    def _set_aside(self, folders: list[Path]) -> None:
        if self._mesh.is_first:
            for folder in folders:
                checkpoint_folder.set_aside(folder)

    # What follows runs in the writing thread, on all processes, each phase to its end before the
    # next.

    def _start_writer(self) -> None:
        if self._mesh.device.type == "cuda":
            torch.cuda.set_device(self._mesh.device)  # a new thread begins at device 0

    def _write(self, step: int, tensors: dict[str, Tensor], extra: dict[str, Any]) -> None:
        start = time.monotonic()
        final = step_folder(self.folder, step)
        temporary = final.with_name(final.name + ".tmp")
        try:
            run_together(lambda: self._begin(temporary, final, tensors), self._group)
            save(
                tensors,
                storage_writer=FileSystemWriter(temporary, overwrite=False),
                planner=_HostCopyPlanner(self._host_copies),
                process_group=self._group,
            )
            described = run_together(lambda: self._describe_own_files(temporary), self._group)
            files = {name: entry for part in described for name, entry in part.items()}
            run_together(lambda: self._finish(temporary, final, files, extra), self._group)
        except Exception:
            if self._mesh.is_first:
                log.exception("%s was not saved", final)
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        size_gib = sum(entry["size"] for entry in files.values()) / 2**30
        log.info("saved %s: %.2f GiB in %.1f s", final, size_gib, time.monotonic() - start)

    def _begin(self, temporary: Path, final: Path, tensors: dict[str, Tensor]) -> None:
        self._host_copies.wait()
        if bad := self._host_copies.non_finite():
            raise CheckpointError(f"not finite: {', '.join(bad[:6])}")
        if not self._mesh.is_first:
            return
        if final.exists():
            raise CheckpointError(
                f"{final} exists already: resume from it, or give this run a folder of its own"
            )
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        free = shutil.disk_usage(self.folder).free
        if free < needed * _SPACE_MARGIN:
            raise CheckpointError(
                f"a checkpoint needs {needed / 2**30:.2f} GiB and {self.folder} has "
                f"{free / 2**30:.2f} GiB free: make room, or lower "
                f"keep_last={self._config.keep_last}"
            )
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def _describe_own_files(self, temporary: Path) -> dict[str, dict[str, int]]:
        """Each process reads back what it wrote itself; rank 0 also what belongs to nobody else."""
        own = f"__{self._mesh.rank}_"
        if self._mesh.is_first:
            for name, text in self._documents.items():
                checkpoint_folder.write_durably(temporary / name, text)
        names = [
            name
            for name in sorted(os.listdir(temporary))
            if name.startswith(own) or (self._mesh.is_first and not name.startswith("__"))
        ]
        return checkpoint_folder.describe_files(temporary, names)

    def _finish(
        self, temporary: Path, final: Path, files: dict[str, Any], extra: dict[str, Any]
    ) -> None:
        if not self._mesh.is_first:
            return
        manifest = {
            "format": checkpoint_folder.FORMAT,
            "step": extra["step"],
            "longtake": longtake.__version__,
            "torch": str(torch.__version__),
            "world_size": self._mesh.world_size,
            "files": files,
            "extra": extra,
        }
        checkpoint_folder.write_manifest(temporary, manifest)
        checkpoint_folder.commit(temporary, final)
        checkpoint_folder.prune(self.folder, self._config.keep_last)


def training_state(
    model: nn.Module, optimizer: torch.optim.AdamW, ema: Ema | None
) -> dict[str, Tensor]:
    """All tensors of a run under flat names, sharing memory with it: reading into them restores the
    run.

    Optimizer state goes by parameter name. It is taken from the optimizer itself, since PyTorch's
    `get_state_dict` leaves it out without a word whenever a gradient exists.
    """
    drop_gathered(model)  # while FSDP has gathered a unit, the module shows other parameters
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, param in model.named_parameters():
        moments = optimizer.state[param]
        assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}, f"{name} has no moments"
        tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in moments.items()}
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.averages.items()}
    return tensors


def load_weights_for_inference(
    folder: Path, model: nn.Module, *, ema: bool = True
) -> dict[str, Any]:
    """Reads a checkpoint's weights into a model, in one process and without a process group;
    returns `extra`.

    The model is unsharded, fp32 and on any device. With `ema` the parameters are the averages;
    buffers are always the model's own.

    Raises: CheckpointError if the folder is damaged or does not fit the model.
    """
    if problems := checkpoint_folder.find_damage(folder):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}")
    params = {name for name, _ in model.named_parameters()}
    targets = {
        f"ema.{name}" if ema and name in params else f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
    }
    with checkpoint_folder.reading(folder):
        manifest = checkpoint_folder.read_manifest(folder)
        reader = _open_reader(folder, manifest)
        stored = reader.metadata.state_dict_metadata
        if ema and not any(name.startswith("ema.") for name in stored):
            raise CheckpointError(f"{folder} has no averaged weights: ask for the plain ones")
        # The rest of the run is not wanted here; a model part that nobody asks for still is an
        # error.
        wanted = {
            name: entry
            for name, entry in stored.items()
            if name.startswith("ema." if ema else "model.") or name in targets
        }
        reader.metadata.state_dict_metadata = wanted
        check_fits(reader.metadata, targets, folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(targets, storage_reader=reader, planner=SafePlanner(), no_dist=True)
    return manifest["extra"]


def _open_reader(folder: Path, manifest: dict[str, Any]) -> SafeReader:
    return SafeReader(folder, {name: entry["size"] for name, entry in manifest["files"].items()})


class _HostCopies:
    """This process's shards as they were at the last save, in host memory that is used again and
    again."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None
        self._copied: torch.cuda.Event | None = None
        self.parts: dict[str, Tensor] = {}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copies the shards of all tensors.

        On a GPU the host does not wait, but whatever the GPU is asked to do from now on does: so no
        update can come in between, and a checkpoint never mixes two steps.
        """
        for name, tensor in tensors.items():
            part = local_part(tensor)
            held = self.parts.get(name)
            if held is None or held.shape != part.shape or held.dtype != part.dtype:
                self.parts[name] = torch.empty(
                    part.shape, dtype=part.dtype, pin_memory=self._is_cuda
                )
        if self._stream is None:
            for name, tensor in tensors.items():
                self.parts[name].copy_(local_part(tensor))
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                self.parts[name].copy_(local_part(tensor), non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        current.wait_event(self._copied)

    def wait(self) -> None:
        """Waits, on the host, until the copies are there."""
        if self._copied is not None:
            self._copied.synchronize()

    def non_finite(self) -> list[str]:
        """The names of copies that hold NaN or infinity."""
        return [
            name
            for name, part in self.parts.items()
            if part.is_floating_point() and not bool(torch.isfinite(part).all())
        ]


class _HostCopyPlanner(DefaultSavePlanner):
    """Plans with the live tensors' names and layouts, but writes the host copies."""

    def __init__(self, host_copies: _HostCopies) -> None:
        super().__init__()
        self._host_copies = host_copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._host_copies.parts[index.fqn]
