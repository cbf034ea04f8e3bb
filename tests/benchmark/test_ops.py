import io

import pytest
import torch
from rich.console import Console

from longtake.benchmark.operations import TINY, Operation, Prepared, Shapes, operations
from longtake.benchmark.ops import _measure, measure_operations, show_operations
from longtake.planning import Ceilings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CEILINGS = Ceilings(
    matmul_flops=800e12, linear_flops=700e12, copy_bytes=4e12, attention_flops=((256, 170e12),)
)


@pytest.fixture(scope="module")
def times():
    return list(measure_operations(TINY, DEVICE, CEILINGS))


def test_every_operation_is_timed_as_plain_torch(times):
    plain = {t.operation: t for t in times if t.implementation in ("reference", "torch")}
    keys = [operation.key for operation in operations(TINY)]
    assert set(keys) == {time.operation for time in times}
    assert len(keys) == len(set(keys))
    for key in keys:
        time = plain[key]
        assert time.failure is None, f"{key}: {time.failure}"
        assert time.forward_ms > 0
        if time.both_ms is not None:
            assert time.floor_both_ms > time.floor_forward_ms


def test_what_cannot_run_says_why(times):
    if DEVICE.type == "cpu":
        kernels = [time for time in times if time.implementation in ("triton", "cudnn", "fa4")]
        assert kernels
        assert {time.failure for time in kernels} == {"needs a GPU"}
    for time in times:
        assert (time.forward_ms is None) == (time.failure is not None)


def test_what_training_takes_is_marked(times):
    marked = {time.operation for time in times if time.is_automatic}
    assert {"norm_modulate", "attention 4 x 16", "text attention 2 x 32 x 8"} <= marked
    for operation in marked:
        assert len([t for t in times if t.operation == operation and t.is_automatic]) == 1


def test_work_is_counted_once_by_hand():
    by_key = {operation.key: operation for operation in operations(Shapes())}
    tokens, width = 65_536, 1152
    temporal = by_key["temporal attention 4096 x 16"]
    # Four tensors of 151 MB: 0.6 GB forward.
    assert temporal.moved[0] == pytest.approx(0.604e9, rel=0.01)
    assert temporal.flops == (4.0 * tokens * 16 * width, 10.0 * tokens * 16 * width)
    assert by_key["attention 8 x 8160"].flops[0] == 4.0 * 8 * 8160**2 * width
    assert by_key["linear 1152 to 3456, wgrad"].flops[0] == 2.0 * tokens * width * 3456
    assert by_key["text attention 16 x 4096 x 120"].flops[0] == 4.0 * tokens * 120 * width
    assert by_key["norm_modulate"].moved == (2 * tokens * width * 2.0, 3 * tokens * width * 2.0)


def test_rates_and_floors_follow_from_the_work(times):
    time = next(t for t in times if (t.operation, t.implementation) == ("gelu", "reference"))
    moved = 2 * 2.0 * TINY.tokens * 4 * TINY.hidden_size
    assert time.rate_unit == "GB/s"
    assert time.forward_rate == pytest.approx(moved / (time.forward_ms / 1000) / 1e9)
    assert time.floor_forward_ms == pytest.approx(moved / 4e12 * 1000)
    time = next(t for t in times if t.operation == "linear 32 to 96, forward")
    assert time.rate_unit == "TFLOP/s"


def test_an_operation_that_breaks_does_not_stop_the_others():
    def prepare(draw, implementation):
        def broken():
            raise RuntimeError("illegal memory access")

        return Prepared(forward=broken)

    operation = Operation(key="broken", implementations=("torch",), prepare=prepare)
    time = _measure(operation, "torch", TINY, DEVICE, CEILINGS)
    assert time.failure == "illegal memory access"
    text = io.StringIO()
    show_operations([time], Console(file=text))
    assert "[illegal memory access]" in text.getvalue()


def test_operations_are_chosen_by_pattern(times):
    found = list(measure_operations(TINY, DEVICE, CEILINGS, only=["gelu", "attention 4*"]))
    assert {time.operation for time in found} == {"gelu", "attention 4 x 16"}
    with pytest.raises(ValueError, match="--only gelo fits none of norm_modulate; "):
        list(measure_operations(TINY, DEVICE, CEILINGS, only=["gelo"]))
    text = io.StringIO()
    show_operations(times, Console(file=text))
    assert "temporal attention 16 x 4" in text.getvalue()
