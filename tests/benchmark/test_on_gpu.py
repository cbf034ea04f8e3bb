"""What only a GPU shows: events, clocks, memory that runs out, kernels in a profile."""

from dataclasses import replace

import pytest
import torch

from longtake.benchmark.ceilings import measure_ceilings
from longtake.benchmark.machine import clocks_now, describe_machine
from longtake.benchmark.measure import StepOptions, measure_step
from longtake.benchmark.profile import profile_step
from longtake.benchmark.records import Protocol
from longtake.benchmark.search import DoesNotFit
from longtake.benchmark.subject import Subject
from tests.benchmark.conftest import real_encoders, tiny_row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROTOCOL = Protocol(warmup=2, steps=5)
CONFIG = tiny_row("stdit-16x256").config


def test_step_is_timed_compiled_with_its_memory_and_clocks(mesh):
    measured = measure_step(CONFIG, mesh, StepOptions(protocol=PROTOCOL, micro_batch=4))
    assert measured.compiled
    assert measured.precision == "bf16"
    assert len(measured.timing.step_ms) == 5
    assert 0 < measured.peak_allocated_gib <= measured.peak_reserved_gib
    assert measured.clocks is not None
    assert "clocks.sm" in measured.clocks


@pytest.mark.parametrize("encoders", ["absent", "on-line", "cached"])
def test_timed_steps_do_not_wait_for_the_device(mesh, encoders, tmp_path):
    is_absent = encoders == "absent"
    config = CONFIG if is_absent else real_encoders(CONFIG, tmp_path, encode_ahead=True)
    subject = Subject(config, mesh, encoders=encoders, seed=0)
    assert subject.encodes_ahead is not is_absent
    workload = subject.workload(0, 4)
    for _ in range(6):
        subject.step(workload)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            subject.step(workload)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_encoding_ahead_trains_on_the_numbers_of_the_serial_path(mesh, tmp_path):
    found = {}
    for ahead in (False, True):
        config = real_encoders(CONFIG, tmp_path, encode_ahead=ahead)
        options = StepOptions(protocol=PROTOCOL, encoders="on-line", micro_batch=4)
        found[ahead] = measure_step(config, mesh, options)
        assert found[ahead].encode_ahead is ahead
        assert found[ahead].parts_ms.keys() == {"transformer", "video encoder", "text encoder"}
    assert found[True].last_loss == pytest.approx(found[False].last_loss, rel=1e-3)


def test_encoding_ahead_shows_in_a_profile(mesh, tmp_path):
    config = real_encoders(CONFIG, tmp_path, encode_ahead=True)
    options = StepOptions(protocol=PROTOCOL, encoders="on-line", micro_batch=4)
    split = profile_step(config, mesh, options, steps=2).split
    assert sum(split.parts_ms.values()) == pytest.approx(split.step_ms)
    assert 0 <= split.parts_ms["encode"] <= split.encode_ms
    assert split.encode_ms > 0


def test_after_memory_ran_out_a_smaller_step_is_measured(mesh):
    huge = StepOptions(protocol=PROTOCOL, micro_batch=1 << 26)
    with pytest.raises(DoesNotFit):
        measure_step(CONFIG, mesh, huge)
    free, total = torch.cuda.mem_get_info()
    assert free > 0.8 * total
    assert measure_step(CONFIG, mesh, replace(huge, micro_batch=4)).micro_batch == 4


def test_profile_adds_up_and_names_kernels(mesh):
    found = profile_step(CONFIG, mesh, StepOptions(protocol=PROTOCOL, micro_batch=4), steps=2)
    split = found.split
    assert sum(split.parts_ms.values()) == pytest.approx(split.step_ms)
    assert all(split.parts_ms[part] > 0 for part in ("forward", "backward", "optimizer"))
    # Every launch was found in some part of the step.
    assert split.parts_ms["other"] < 0.3 * split.step_ms
    assert split.launches > 20
    assert found.compiled_meanwhile == 0
    assert not found.graphs.breaks


def test_machine_and_ceilings_are_those_of_this_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    assert "power.limit" in describe_machine(device)["gpu"]
    assert clocks_now(device) is not None
    ceilings = measure_ceilings(device)
    assert ceilings.linear_flops > 1e12
    assert len(ceilings.attention_flops) == 5
