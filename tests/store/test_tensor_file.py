"""Our own safetensors: readable by the library, named after their bytes, suspicious of headers."""

import json
import os

import pytest
import torch
from safetensors import safe_open

from longtake.store.tensor_file import StoreError, is_as_named, read_header, write_tensors

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
    "latents": torch.randn(3, 5).bfloat16(),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "nothing": torch.zeros(0, dtype=torch.uint8),
}


def _write(folder, tensors=TENSORS):
    return write_tensors(folder, "some", tensors.items(), {"what": "a test"})


def test_the_library_reads_what_we_write(tmp_path):
    path = _write(tmp_path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"what": "a test"}
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor), name
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "a temporary file is left"


def test_offsets_are_those_of_the_bytes(tmp_path):
    path = _write(tmp_path)
    header, raw = read_header(path), path.read_bytes()
    assert header.size == len(raw)
    for name, placed in header.tensors.items():
        assert raw[placed.begin : placed.end] == TENSORS[name].view(torch.uint8).numpy().tobytes()
        assert placed.shape == TENSORS[name].shape


def test_a_file_is_named_after_its_bytes(tmp_path):
    path = _write(tmp_path)
    assert _write(tmp_path) == path, "equal content must have one name"
    assert is_as_named(path)
    raw = bytearray(path.read_bytes())
    for place in range(0, len(raw), 5):
        raw[place] ^= 1 << place % 8
        path.write_bytes(raw)
        assert not is_as_named(path), f"byte {place}"
        raw[place] ^= 1 << place % 8
    path.write_bytes(raw)
    assert is_as_named(path)


def _with_header(document, data=b"\0" * 16):
    header = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(header).to_bytes(8, "little") + header + data


def _entry(**changes):
    return {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]} | changes


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"\x02", "no header of"),
        ((2**60).to_bytes(8, "little") + b"{}", "no header of 1152921504606846976 bytes"),
        (_with_header(b"not json"), "its header cannot be read"),
        (_with_header(b"[" * 5000), "its header cannot be read"),
        (_with_header([]), "its header cannot be read"),
        (_with_header({"a": 3}), "its header cannot be read"),
        (_with_header({"__metadata__": {"a": 3}, "a": _entry()}), "metadata is not text"),
        (_with_header({"a": _entry(dtype="F8")}), "an entry of dtype 'F8'"),
        (_with_header({"a": _entry(dtype=["U8"])}), "its header cannot be read"),
        (_with_header({"a": _entry(shape=[2**61, 8])}), "16 bytes for shape"),
        (_with_header({"a": _entry(shape=[-16])}), r"shape \[-16\]"),
        (_with_header({"a": _entry(shape=16)}), "its header cannot be read"),
        (_with_header({"a": _entry(data_offsets=[0, 8])}), "8 bytes for shape"),
        (_with_header({"a": _entry(data_offsets=[0])}), "its header cannot be read"),
        (_with_header({"a": _entry(data_offsets=[1, 17])}), "does not begin where"),
        (_with_header({"a": _entry(), "b": _entry()}), "tensor 'b' does not begin where"),
        (_with_header({"a": _entry()}, b"\0" * 15), "bytes, but its header describes"),
        (_with_header({"a": _entry()}, b"\0" * 17), "bytes, but its header describes"),
    ],
    ids=range(18),
)
def test_headers_that_lie_are_refused(tmp_path, raw, problem):
    path = tmp_path / "lie.safetensors"
    path.write_bytes(raw)
    with pytest.raises(StoreError, match=problem):
        read_header(path)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for name, problem in (("pipe", "a pipe"), ("empty", "empty"), ("absent", "no such file")):
        with pytest.raises(StoreError, match=problem):
            read_header(tmp_path / name)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path)
    assert list(tmp_path.iterdir()) == []
