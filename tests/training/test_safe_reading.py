"""Hostile checkpoints with right checksums: nothing in them may run or lead out of the folder."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from longtake.training import load_weights_for_inference
from longtake.training.checkpoint_folder import describe_files, read_manifest, write_manifest
from longtake.training.safe_reading import METADATA, UnsafeCheckpointError
from tests.processes import run_in_processes
from tests.toy_model import ToyModel
from tests.training.toy_run import build_run, checkpointer_of


def _save(folder: Path):
    run = build_run()
    checkpointer = checkpointer_of(run, folder)
    checkpointer.save(1, run.model, run.optimizer, run.ema, {})
    checkpointer.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    run_in_processes(_save, 1, folder)
    return folder / "step-1"


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def _bomb(metadata, canary):
    return Bomb(canary)


def _bomb_inside(metadata, canary):
    metadata.planner_data = {"model.head.bias": Bomb(canary)}
    return metadata


def _traversal(metadata, canary):
    for index, place in metadata.storage_data.items():
        place.relative_path = "../../secret"
        metadata.storage_data[index] = place
    return metadata


def _absolute(metadata, canary):
    for place in metadata.storage_data.values():
        place.relative_path = "/etc/passwd"
    return metadata


def _beyond_the_end(metadata, canary):
    for place in metadata.storage_data.values():
        place.length = 1 << 60
    return metadata


def _pickled_entry(metadata, canary):
    metadata.state_dict_metadata["model.head.bias"] = BytesStorageMetadata()
    return metadata


def _not_metadata(metadata, canary):
    return [1, 2, 3]


def _no_places(metadata, canary):
    metadata.storage_data = None
    return metadata


def forge(good: Path, folder: Path, make, canary: Path) -> Path:
    """A copy whose metadata is changed and whose manifest agrees with it."""
    forged = folder / "step-1"
    shutil.copytree(good, forged)
    metadata = pickle.loads((forged / METADATA).read_bytes())
    (forged / METADATA).write_bytes(pickle.dumps(make(metadata, canary)))
    body = read_manifest(forged)
    body["files"] |= describe_files(forged, [METADATA])
    (forged / "manifest.json").unlink()
    write_manifest(forged, body)
    return forged


HOSTILE = {
    "bomb": (_bomb, "asks for posix.mkdir"),
    "bomb-inside": (_bomb_inside, "asks for posix.mkdir"),
    "traversal": (_traversal, r"leads to '../../secret', which is not its file"),
    "absolute": (_absolute, "leads to '/etc/passwd'"),
    "beyond-the-end": (_beyond_the_end, "reads beyond the end of __0_0.distcp"),
    "pickled-entry": (_pickled_entry, "entry model.head.bias is not a tensor"),
    "not-metadata": (_not_metadata, "it holds no metadata"),
    "no-places": (_no_places, "does not say where its tensors are"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_metadata_is_refused_and_does_nothing(good, tmp_path, kind):
    make, message = HOSTILE[kind]
    canary = tmp_path / "canary"
    forged = forge(good, tmp_path, make, canary)
    model = ToyModel()
    before = model.head.weight.clone()
    with pytest.raises(UnsafeCheckpointError, match=message):
        load_weights_for_inference(forged, model)
    assert not canary.exists()
    assert (model.head.weight == before).all()


def test_garbage_for_metadata_is_refused(good, tmp_path):
    forged = forge(good, tmp_path, _not_metadata, tmp_path / "canary")
    (forged / METADATA).write_bytes(b"\x80\x04garbage")
    body = read_manifest(forged)
    body["files"] |= describe_files(forged, [METADATA])
    (forged / "manifest.json").unlink()
    write_manifest(forged, body)
    with pytest.raises(UnsafeCheckpointError, match="is refused: it cannot be read"):
        load_weights_for_inference(forged, ToyModel())


def _resume(folder: Path):
    run = build_run()
    checkpointer = checkpointer_of(run, folder)
    try:
        checkpointer.resume(run.model, run.optimizer, run.ema)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        checkpointer.close()


def test_a_resuming_run_refuses_it_on_every_process(good, tmp_path):
    canary = tmp_path / "canary"
    forge(good, tmp_path, _bomb, canary)
    for text in run_in_processes(_resume, 2, tmp_path):
        assert "UnsafeCheckpointError" in text
        assert "asks for posix.mkdir" in text
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a/b", ""])
def test_a_manifest_names_only_its_own_files(good, tmp_path, name):
    folder = tmp_path / "step-1"
    shutil.copytree(good, folder)
    body = read_manifest(folder)
    body["files"][name] = {"size": 1, "crc32": 1}
    (folder / "manifest.json").unlink()
    write_manifest(folder, body)
    with pytest.raises(RuntimeError, match="names files that no checkpoint has"):
        read_manifest(folder)


def test_a_pipe_among_the_files_does_not_block(good, tmp_path):
    folder = tmp_path / "step-1"
    shutil.copytree(good, folder)
    (folder / "__0_0.distcp").unlink()
    os.mkfifo(folder / "__0_0.distcp")
    with pytest.raises(RuntimeError, match=r"__0_0\.distcp cannot be read"):
        load_weights_for_inference(folder, ToyModel())
