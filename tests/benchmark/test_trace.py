"""Traces made by hand: times in microseconds, as the profiler writes them."""

import pytest

from longtake.benchmark.trace import STEP, split_step

FORWARD, BACKWARD = "longtake.forward", "longtake.backward"


def _span(name, start, end):
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": start, "dur": end - start}


class _Device:
    """Kernels with the calls that launched them."""

    def __init__(self):
        self.events = []

    def runs(self, name, start, end, *, launched, cat="kernel", tid=1, call="cuda_runtime"):
        number = len(self.events)
        arguments = {"correlation": number}
        self.events += [
            {"ph": "X", "cat": call, "ts": launched, "dur": 1, "tid": tid, "args": arguments}
            | {"name": "launch"},
            {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start}
            | {"args": arguments},
        ]


def _one_step():
    """A first step that ends on the device at 1000, then one from there to 2000."""
    device = _Device()
    device.runs("warm", 500, 1000, launched=10)
    device.runs("Memcpy HtoD (Pinned -> Device)", 1000, 1050, launched=105, cat="gpu_memcpy")
    device.runs("conv", 1050, 1150, launched=120)
    device.runs("gemm", 1150, 1350, launched=210, call="cuda_driver")
    # From autograd's thread, within the main thread's span.
    device.runs("gemm", 1400, 1700, launched=310, tid=2)
    device.runs("ncclDevKernel_ReduceScatter", 1650, 1800, launched=320, tid=2)
    device.runs("adam", 1850, 1950, launched=410)
    device.runs("fill", 1950, 2000, launched=480)
    spans = [
        _span(STEP, 0, 90),
        _span(STEP, 100, 500),
        _span("longtake.encode", 101, 199),
        _span(FORWARD, 200, 299),
        _span(BACKWARD, 300, 399),
        _span("longtake.optimizer", 400, 450),
    ]
    return device, spans


def test_kernels_belong_to_the_part_that_launched_them():
    device, spans = _one_step()
    found = split_step([*device.events, *spans])
    assert found.step_ms == pytest.approx(1.0)
    expected = {
        "data": 0.05,
        "encode": 0.1,
        "forward": 0.2,
        "backward": 0.3,
        "optimizer": 0.1,
        "other": 0.05,
        "communication": 0.1,  # what does not run beside the product
        "idle": 0.1,
    }
    assert found.parts_ms == pytest.approx(expected)
    assert found.communication_ms == pytest.approx(0.15)
    assert (found.launches, found.copies) == (6, 1)


def test_costliest_kernels_come_first_with_all_their_launches():
    device, spans = _one_step()
    found = split_step([*device.events, *spans], top=2)
    assert [kernel.name for kernel in found.costliest] == ["gemm", "ncclDevKernel_ReduceScatter"]
    gemm = found.costliest[0]
    assert (gemm.ms, gemm.count) == (pytest.approx(0.5), 2)
    assert gemm.share == pytest.approx(0.5)


def test_several_steps_are_averaged():
    device, spans = _one_step()
    device.runs("gemm", 2000, 2500, launched=1210)
    device.runs("adam", 2600, 3000, launched=1410)
    spans += [_span(STEP, 1100, 1500), _span(FORWARD, 1200, 1299)]
    spans += [_span("longtake.optimizer", 1400, 1450)]
    found = split_step([*device.events, *spans])
    assert found.step_ms == pytest.approx(1.0)
    assert found.parts_ms["forward"] == pytest.approx((0.2 + 0.5) / 2)
    assert found.parts_ms["idle"] == pytest.approx((0.1 + 0.1) / 2)
    assert sum(found.parts_ms.values()) == pytest.approx(found.step_ms)
    assert found.launches == 4


def test_without_a_device_spans_are_the_parts_and_operations_the_kernels():
    def operation(name, start, end):
        return _span(name, start, end) | {"cat": "cpu_op", "tid": 1}

    found = split_step(
        [
            _span(STEP, 0, 100),
            operation("aten::warm", 10, 90),
            _span(STEP, 1000, 2000),
            _span(FORWARD, 1000, 1400),
            _span(BACKWARD, 1500, 1900),
            operation("aten::linear", 1000, 1300),
            operation("aten::addmm", 1050, 1250),
            operation("aten::addmm", 1500, 1700),
        ]
    )
    assert found.step_ms == pytest.approx(1.0)
    assert found.parts_ms["forward"] == found.parts_ms["backward"] == pytest.approx(0.4)
    assert found.parts_ms["other"] == pytest.approx(0.2)
    assert [(k.name, k.count) for k in found.costliest] == [("aten::addmm", 2), ("aten::linear", 1)]
    assert [k.ms for k in found.costliest] == pytest.approx([0.4, 0.1])  # of themselves alone


def test_a_trace_needs_a_step_to_get_up_to_pace():
    with pytest.raises(AssertionError, match="at least two"):
        split_step([_span(STEP, 0, 10)])


def test_what_runs_beside_training_is_not_counted_twice():
    device = _Device()
    device.runs("warm", 500, 1000, launched=10)
    device.runs("gemm", 1000, 1600, launched=210)
    device.runs("conv", 1400, 1900, launched=120)  # of the next batch, on another stream
    device.runs("norm", 1500, 1700, launched=121)
    spans = [
        _span(STEP, 0, 90),
        _span(STEP, 100, 500),
        _span("longtake.encode", 101, 199),
        _span(FORWARD, 200, 299),
    ]
    found = split_step([*device.events, *spans])
    assert found.parts_ms["forward"] == pytest.approx(0.6)
    assert found.parts_ms["encode"] == pytest.approx(0.3)
    assert found.encode_ms == pytest.approx(0.5)
    assert sum(found.parts_ms.values()) == pytest.approx(found.step_ms) == pytest.approx(0.9)
