import pytest
import torch

from longtake.ops import numerics
from longtake.programs import doctor
from tests.programs.runs import save_config, tiny_config, write_manifest


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def _doctor(capsys, *arguments):
    status = doctor.main([str(argument) for argument in arguments])
    return status, capsys.readouterr().out


def test_doctor_tries_what_it_reports(capsys):
    status, out = _doctor(capsys)
    assert status == 0
    for text in ("PyTorch", "math attention", "H.264 mp4 written and read back", "tensorboard"):
        assert text in out


def test_doctor_fails_when_something_needed_does_not_work(monkeypatch, capsys):
    def broken():
        raise OSError("no encoder")

    monkeypatch.setattr(doctor, "_encode_and_decode", broken)
    status, out = _doctor(capsys)
    assert status == 1
    assert "not usable: no encoder" in out


def _result(passed, detail):
    check = numerics.Check(
        operation="gelu", implementation="triton", dtype=torch.bfloat16, shape={"N": 3, "D": 8}
    )
    error = 1e-3 if passed else 0.5
    return numerics.Result(
        check=check, passed=passed, error=error, allowed=4e-3, detail=detail, seconds=0.1
    )


def test_doctor_compares_attention_with_plain_torch_where_there_are_no_kernels(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out = _doctor(capsys, "--numerics")
    assert status == 0
    assert "There are no fused kernels to check on a CPU" in out
    assert "self_attention      sdpa    bfloat16  B=2 N=37 A=2 E=24" in out
    assert " 0 failed" in out


def test_doctor_shows_each_comparison_and_fails_with_it(monkeypatch, capsys):
    results = [_result(True, "out"), _result(False, "dx")]
    monkeypatch.setattr(numerics, "run_checks", lambda device: iter(results))
    status, out = _doctor(capsys, "--numerics")
    assert status == 1
    assert "gelu                triton  bfloat16  N=3 D=8" in out
    assert "1.0e-03 / 4.0e-03  pass" in out
    assert "5.0e-01 / 4.0e-03  FAIL dx" in out
    assert "2 checks in 0 s, 1 failed" in out


def test_doctor_finds_a_good_manifest_healthy(tmp_path, manifest, capsys):
    path = save_config(tiny_config(tmp_path, manifest))
    status, out = _doctor(capsys, "--manifest", manifest, "--config", path, "--processes", 1)
    assert status == 0
    assert "3 checked, 0 unreadable" in out
    assert "3 of 3, 3 classes" in out
    assert "4x32x32" in out


def test_doctor_names_the_bad_file(tmp_path, manifest, capsys):
    (manifest.parent / "[red]broken.mp4").write_bytes(b"not a video" * 200)
    rows = [{"path": "clip0.mp4"}, {"path": "[red]broken.mp4"}]
    bad = write_manifest(manifest.parent / "doctor.jsonl", rows)
    path = save_config(tiny_config(tmp_path, manifest))
    status, out = _doctor(capsys, "--manifest", bad, "--config", path, "--processes", 1)
    assert status == 1
    assert "2 checked, 1 unreadable" in out
    assert "unreadable: [red]broken.mp4 (line 2)" in out


def test_doctor_fails_when_a_bucket_stays_empty(manifest, capsys):
    # The preset wants more frames than the clips have.
    arguments = ("--manifest", manifest, "--preset", "stdit-xl2-64x512", "--processes", 1)
    status, out = _doctor(capsys, *arguments)
    assert status == 1
    assert "64x512x512" in out
