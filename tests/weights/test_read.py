import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longtake.weights.read import WeightsError, read_state_dict, read_weights


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(4, dtype=torch.float16)}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_flat_torch_file_is_read(tmp_path, state, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path)
    assert_same(read_state_dict(path), state)


@pytest.mark.parametrize("wrapper", ["ema", "state_dict", "model"])
def test_wrapped_weights_are_unwrapped_and_it_is_said(tmp_path, state, wrapper):
    torch.save({"epoch": 3, wrapper: state, "opt": {"lr": 1.0}}, tmp_path / "run.pt")
    read = read_weights(tmp_path / "run.pt")
    assert_same(read.state, state)
    assert read.wrapper == wrapper
    assert read.beside == ("epoch", "opt")
    assert f"inside '{wrapper}'" in read.describe()


def test_wrapper_can_be_chosen(tmp_path, state):
    raw = {name: value + 1 for name, value in state.items()}
    torch.save({"model": raw, "ema": state}, tmp_path / "run.pt")
    assert_same(read_state_dict(tmp_path / "run.pt"), state)
    assert_same(read_state_dict(tmp_path / "run.pt", wrapper="model"), raw)
    with pytest.raises(WeightsError, match="no dictionary 'best' inside; found: model, ema"):
        read_state_dict(tmp_path / "run.pt", wrapper="best")


def test_prefixes_of_wrapping_modules_are_stripped(tmp_path, state):
    torch.save({f"module._orig_mod.{k}": v for k, v in state.items()}, tmp_path / "ddp.pt")
    read = read_weights(tmp_path / "ddp.pt")
    assert_same(read.state, state)
    assert read.prefix == "module._orig_mod."


def test_safetensors_file_folder_and_shards_are_read(tmp_path, state):
    save_file(state, tmp_path / "one.safetensors", metadata={"made_by": "test"})
    assert_same(read_state_dict(tmp_path / "one.safetensors"), state)

    (tmp_path / "config.json").write_text('{"_class_name": "X"}')
    read = read_weights(tmp_path)
    assert_same(read.state, state)
    assert (read.metadata, read.config) == ({"made_by": "test"}, {"_class_name": "X"})

    folder = write_shards(tmp_path / "sharded", state)
    assert_same(read_state_dict(folder), state)
    assert_same(read_state_dict(folder / "m.safetensors.index.json"), state)


def write_shards(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    weight_map = {}
    for number, (name, value) in enumerate(state.items()):
        save_file({name: value}, folder / f"m-{number}.safetensors")
        weight_map[name] = f"m-{number}.safetensors"
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_index_is_checked_against_its_shards(tmp_path, state):
    folder = write_shards(tmp_path / "sharded", state)
    index = folder / "m.safetensors.index.json"
    with_stranger = {
        "weight_map": {**json.loads(index.read_text())["weight_map"], "c": "m-0.safetensors"}
    }
    index.write_text(json.dumps(with_stranger))
    with pytest.raises(WeightsError, match=r"m-0\.safetensors and the index disagree about c"):
        read_state_dict(folder)

    for outside in ("../secret.safetensors", "/etc/x.safetensors", 7):
        index.write_text(json.dumps({"weight_map": {"a.weight": outside}}))
        with pytest.raises(WeightsError, match="not a plain file name"):
            read_state_dict(folder)

    index.write_text(json.dumps({"weight_map": {"a.weight": "gone.safetensors"}}))
    with pytest.raises(WeightsError, match=r"the shard gone\.safetensors is missing"):
        read_state_dict(folder)


def test_non_tensor_entries_are_listed_and_refused(tmp_path, state):
    torch.save({**state, "step": 7, "history": [1, 2]}, tmp_path / "mixed.pt")
    with pytest.raises(
        WeightsError, match=r"not plain tensors: 'step' \(int\), 'history' \(list\)"
    ):
        read_state_dict(tmp_path / "mixed.pt")


class Bomb:
    """Unpickling it runs a command that creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("kind", ["torch", "bare pickle"])
def test_code_in_a_file_never_runs(tmp_path, state, kind):
    canary, path = tmp_path / "canary", tmp_path / "bomb.pt"
    payload = {**state, "x": Bomb(canary)}
    if kind == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    with pytest.raises(WeightsError) as caught:
        read_state_dict(path)
    assert not canary.exists()
    assert "\n" not in str(caught.value)
    if kind == "torch":
        assert "holds more than tensors (posix.system)" in str(caught.value)


def test_truncated_files_give_one_line(tmp_path, state):
    torch.save(state, tmp_path / "whole.pt")
    save_file(state, tmp_path / "whole.safetensors")
    for name in ("whole.pt", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        cut = tmp_path / f"cut{Path(name).suffix}"
        for length in (0, 5, 9, len(content) // 2, len(content) - 3):
            cut.write_bytes(content[:length])
            with pytest.raises(WeightsError) as caught:
                read_state_dict(cut)
            assert "\n" not in str(caught.value)


def test_wrong_kinds_of_file_are_named(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.pt").read_bytes())
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        read_state_dict(tmp_path / "x.safetensors")
    (tmp_path / "x.mp4").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"unknown kind of file '\.mp4'"):
        read_state_dict(tmp_path / "x.mp4")
    with pytest.raises(WeightsError, match="no such file or folder"):
        read_state_dict(tmp_path / "missing.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"holds no \.safetensors file"):
        read_state_dict(tmp_path / "empty")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds a list, not a dictionary"):
        read_state_dict(tmp_path / "list.pt")
    torch.save({}, tmp_path / "nothing.pt")
    with pytest.raises(WeightsError, match="holds no tensor"):
        read_state_dict(tmp_path / "nothing.pt")


def test_compressed_archives_are_refused(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as source:
        records = {record.filename: source.read(record) for record in source.infolist()}
    with zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in records.items():
            target.writestr(name, content)
    with pytest.raises(WeightsError, match="compressed record"):
        read_state_dict(tmp_path / "z.pt")


def test_views_that_repeat_their_storage_are_refused(tmp_path):
    torch.save({"huge": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="claim 4000000000000 bytes"):
        read_state_dict(tmp_path / "x.pt")


def test_broken_json_is_named(tmp_path, state):
    save_file(state, tmp_path / "m.safetensors")
    for content in ("{", "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(WeightsError, match=r"config\.json"):
            read_weights(tmp_path)
