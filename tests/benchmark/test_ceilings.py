import torch

from longtake.benchmark.ceilings import measure_ceilings, seconds_of
from longtake.benchmark.machine import clocks_now, describe_machine


def test_ceilings_are_what_this_device_does():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure_ceilings(device)
    # Between a slow core under load and ten times any device there is.
    assert 1e8 < found.matmul_flops < 1e16
    assert 1e8 < found.linear_flops < 1e16
    assert 1e7 < found.copy_bytes < 1e14
    keys = [keys for keys, _ in found.attention_flops]
    assert keys == sorted(keys)
    assert all(1e6 < flops < 1e16 for _, flops in found.attention_flops)


def test_a_time_is_the_median_after_warmup(monkeypatch):
    from longtake.benchmark import ceilings as room

    now, calls = [0.0], [0]

    def run():
        calls[0] += 1
        now[0] += 100.0 if calls[0] <= 3 else calls[0]

    monkeypatch.setattr(room.time, "perf_counter", lambda: now[0])
    assert seconds_of(run, torch.device("cpu"), repeats=5) == 6  # of 4, 5, 6, 7, 8


def test_machine_is_described_without_a_gpu_too():
    device = torch.device("cpu")
    found = describe_machine(device)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]
    assert found["gpu"] == {}
    assert "commit" in found
    assert clocks_now(device) is None
