"""The comparison of every implementation with plain torch, and what follows from a failure."""

import multiprocessing
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from longtake import ops
from longtake.ops import attention, gelu, kernels, numerics, numerics_apart, text_attention
from longtake.ops.kernels import KernelConfig, kernels_as
from longtake.ops.numerics import (
    AttentionUse,
    Check,
    checks,
    run_check,
    run_checks,
    verify_chosen,
)
from longtake.ops.numerics_apart import run_checks_apart
from longtake.ops.numerics_operations import OPERATIONS

torch.set_num_threads(1)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
SELF = AttentionUse(kind="self_attention", keys=20, head_size=8, num_heads=2)
CROSS = AttentionUse(kind="cross_attention", keys=7, head_size=16, num_heads=1)


@pytest.fixture(autouse=True)
def _nothing_ruled_out(monkeypatch):
    monkeypatch.setattr(kernels, "_ruled_out", {})


@pytest.fixture
def triton_on_the_cpu(monkeypatch):
    """ "auto" prefers our kernels here, too; the interpreter runs them."""
    if not kernels.is_interpreted():
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(kernels, "runs_triton", lambda device: True)


def self_check(dtype=torch.float32):
    shape = {"B": 2, "N": 20, "A": 2, "E": 8}
    return Check(operation="self_attention", implementation="sdpa", dtype=dtype, shape=shape)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_implementation_agrees_with_plain_torch(operation):
    results = list(run_checks(DEVICE, only=[operation]))
    assert [result.reason for result in results if not result.passed] == []
    checked = {result.check.implementation for result in results}
    can_run_triton = kernels.runs_triton(DEVICE) or kernels.is_interpreted()
    has_triton_kernel = "triton" in OPERATIONS[operation].implementations
    assert ("triton" in checked) == (can_run_triton and has_triton_kernel)
    assert {result.check.operation for result in results} <= {operation}


def test_every_fused_operation_is_checked():
    """A file of ops with a reference is one with something to compare it with."""
    has_no_kernel = {
        "attention",  # what self-attention and temporal attention fall back on, in plain_attention
        "rms_norm",
        "rotary",
        "sincos",
    }
    found = set()
    for path in Path(ops.__file__).parent.glob("*.py"):
        found |= set(re.findall(r"^def (\w+)_reference\(", path.read_text(), re.MULTILINE))
    kinds = {
        "flash_attention": "self_attention",
        "text_attention": "cross_attention",
        "partial_attention_backward": "partial_attention",
    }
    expected = {kinds.get(name, name) for name in found - has_no_kernel}
    assert expected <= set(OPERATIONS)


def test_half_precision_of_the_largest_models_comes_in_each_dtype_and_shape():
    gpu = torch.device("cuda")
    for kind, letter, expected in (
        ("self_attention", "N", {256, 1000, 1024, 4096}),
        ("temporal_attention", "T", {1, 5, 16, 17, 64}),
        ("cross_attention", "L", {1, 7, 120}),
    ):
        cases = list(OPERATIONS[kind].cases(gpu, "triton"))
        in_bfloat16 = [shape for dtype, shape in cases if dtype == torch.bfloat16]
        assert {shape[letter] for shape in in_bfloat16 if shape["E"] == 72} == expected
        assert any(shape["E"] == 64 for shape in in_bfloat16)
        assert {dtype for dtype, _ in cases} == {torch.bfloat16, torch.float16, torch.float32}


# What a wrong implementation leads to.


def with_wrong_gradient(attend, *, of, factor):
    """The same output, but the gradient of one input is scaled."""

    def wrong(*qkv):
        qkv = list(qkv)
        qkv[of] = factor * qkv[of] - (factor - 1) * qkv[of].detach()
        return attend(*qkv)

    return wrong


@pytest.mark.skipif(not kernels.is_interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_backward_wrong_by_a_hundredth_is_caught(dtype, monkeypatch):
    shape = {"B": 2, "N": 9, "D": 40}
    check = Check(operation="gelu", implementation="triton", dtype=dtype, shape=shape)
    assert run_check(check, CPU).passed

    right = gelu.gelu_backward

    def wrong(*arguments):
        dpre, *rest = right(*arguments)
        return 1.01 * dpre, *rest

    monkeypatch.setattr(gelu, "gelu_backward", wrong)
    result = run_check(check, CPU)
    assert not result.passed
    assert result.detail == "dx"
    assert result.error > result.allowed > 0
    assert result.reason.startswith("gelu by triton in float")
    assert re.search(r"at B=2 N=9 D=40: dx is wrong by .*, .* allowed", result.reason)


@pytest.mark.parametrize("of", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_wrong_gradient_is_named(dtype, of, monkeypatch):
    sdpa = attention._BACKENDS["sdpa"]
    monkeypatch.setitem(attention._BACKENDS, "sdpa", with_wrong_gradient(sdpa, of=of, factor=1.1))
    result = run_check(self_check(dtype), CPU)
    assert not result.passed
    assert result.detail == ("dq", "dk", "dv")[of]


def broken(*_):
    raise RuntimeError("no such engine\nand more")


def test_a_small_gradient_is_not_hidden_by_the_rounding_of_a_large_one(monkeypatch):
    def times_thousand(x, y):
        return (1001 * x, y)

    operation = replace(
        OPERATIONS["gelu"],
        draw=lambda shape, generator: {
            name: torch.randn(shape["N"], generator=generator, dtype=torch.float64) for name in "xy"
        },
        run=with_wrong_gradient(times_thousand, of=1, factor=1.1),
        reference=times_thousand,
        plain=times_thousand,
        outputs=("large", "small"),
    )
    monkeypatch.setitem(numerics.OPERATIONS, "gelu", operation)
    check = Check(
        operation="gelu", implementation="reference", dtype=torch.bfloat16, shape={"N": 50}
    )
    result = run_check(check, CPU)
    assert not result.passed
    assert result.detail == "dy"


def test_the_named_implementation_is_the_one_that_runs(monkeypatch):
    monkeypatch.setitem(attention._BACKENDS, "reference", broken)
    assert run_check(self_check(), CPU).passed
    assert not run_check(replace(self_check(), implementation="reference"), CPU).passed


FAILURES = {
    "nan": (lambda q, k, v: torch.nan * q * k * v, "out is not finite"),
    "infinity": (lambda q, k, v: torch.inf * q * k * v, "out is not finite"),
    "shape": (lambda q, k, v: (q * k * v)[:, :1], "AssertionError: out has shape"),
    "raises": (broken, "RuntimeError: no such engine"),
}


@pytest.mark.parametrize(("wrong", "detail"), FAILURES.values(), ids=FAILURES)
def test_what_is_not_a_number_or_raises_is_a_failure(wrong, detail, monkeypatch):
    monkeypatch.setitem(attention._BACKENDS, "sdpa", wrong)
    result = run_check(self_check(), CPU)
    assert not result.passed
    assert result.detail.startswith(detail)
    assert "\n" not in result.detail
    assert result.reason == (
        f"self_attention by sdpa in float32 at B=2 N=20 A=2 E=8: {result.detail}"
    )


def test_a_failure_does_not_stop_the_rest(monkeypatch):
    monkeypatch.setitem(attention._BACKENDS, "sdpa", broken)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    results = list(run_checks(CPU, only=["self_attention", "cross_attention"]))
    passed = {result.check.operation: result.passed for result in results}
    assert passed == {"self_attention": False, "cross_attention": True}


def outcomes(results):
    return [(result.check, result.passed, result.error, result.detail) for result in results]


def test_checks_in_processes_are_those_of_one_in_the_same_order(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    chosen = [check for check in checks(CPU) if check.operation.endswith("s_attention")]
    chosen = [self_check(), *chosen, self_check(torch.bfloat16)]
    apart = outcomes(run_checks_apart(chosen, CPU, 2))
    assert apart == outcomes(run_check(check, CPU) for check in chosen)
    assert len(apart) > 2


@dataclass(frozen=True, kw_only=True)
class Bad(Check):
    """Does something to the process that is sent it."""

    deed: tuple

    def __reduce__(self):
        return self.deed


def bad_check(function, *arguments):
    fields = vars(self_check()) | {"implementation": "triton", "deed": (function, arguments)}
    return Bad(**fields)


@pytest.mark.parametrize(
    ("bad", "detail"),
    [
        (bad_check(os._exit, 1), "its process died"),
        (bad_check(time.sleep, 600), "it did not end within 2 s"),
    ],
    ids=["dies", "hangs"],
)
def test_a_check_that_ends_or_holds_its_process_is_one_failure(bad, detail):
    good = self_check()
    results = list(run_checks_apart([good, bad, good, good], CPU, 1, check_seconds=2))
    assert [result.passed for result in results] == [True, False, True, True]
    assert (results[1].check, results[1].detail) == (bad, detail)


def test_a_device_that_no_longer_runs_is_a_failure():
    results = list(run_checks_apart([self_check(), self_check()], torch.device("meta"), 1))
    assert [result.passed for result in results] == [False, False]
    assert all("broke the device for this process" in result.detail for result in results)


def test_a_device_for_one_process_is_left_to_this_one(monkeypatch, caplog):
    monkeypatch.setattr(numerics_apart, "run_check", lambda check, device: run_check(check, CPU))
    chosen = [self_check(), self_check(torch.bfloat16)]
    results = list(run_checks_apart(chosen, torch.device("cuda", 99), 2))
    assert [result.check for result in results] == chosen
    assert all(result.passed for result in results)
    assert "cannot use cuda:99" in caplog.text


def test_no_process_outlives_a_caller_that_stops_early():
    run = run_checks_apart([self_check()] * 3, CPU, 1)
    assert next(run).passed
    before = multiprocessing.active_children()
    run.close()
    assert before
    assert not set(before) & set(multiprocessing.active_children())


# Before training.


def chosen(use, device=CPU):
    return kernels.attention_backend(
        use.kind, keys=use.keys, head_size=use.head_size, dtype=torch.float32, device=device
    )


def test_what_auto_chooses_is_verified_and_stays():
    (result,) = verify_chosen(CPU, torch.float32, attentions=[SELF], hidden_size=16)
    assert result.passed
    assert result.check.implementation == chosen(SELF) == "sdpa"
    assert result.check.shape == {"B": 1, "N": 20, "A": 2, "E": 8}
    assert kernels.ruled_out() == {}


def test_after_a_failure_auto_goes_on_to_the_next(monkeypatch):
    monkeypatch.setitem(attention._BACKENDS, "sdpa", broken)
    (result,) = verify_chosen(CPU, torch.float32, attentions=[SELF])
    assert not result.passed
    assert chosen(SELF) == "reference"
    assert kernels.ruled_out() == {("self_attention", "sdpa"): result.reason}


def test_a_wrong_kernel_gives_way_to_pytorch(triton_on_the_cpu, monkeypatch):
    assert chosen(CROSS) == "triton"
    right = text_attention.launch_backward

    def wrong(*arguments):
        dq, dkv = right(*arguments)
        return 1.5 * dq, dkv

    monkeypatch.setattr(text_attention, "launch_backward", wrong)
    results = verify_chosen(CPU, torch.float32, attentions=[CROSS])
    assert [(r.check.implementation, r.passed) for r in results] == [
        ("triton", False),
        ("sdpa", True),
    ]
    assert results[0].detail == "dq"
    assert chosen(CROSS) == "sdpa"


def test_wrong_element_wise_kernels_give_way_to_plain_torch(triton_on_the_cpu, monkeypatch):
    assert kernels.elementwise(torch.zeros(1)) == "triton"
    small = {
        name: replace(operation, shape_for=lambda D: {"B": 2, "N": 3, "D": D})
        for name, operation in OPERATIONS.items()
        if name in ("norm_modulate", "gelu", "gated_residual")
    }
    monkeypatch.setattr(numerics, "OPERATIONS", small)
    monkeypatch.setattr(gelu, "gelu_forward", broken)
    results = verify_chosen(CPU, torch.float32, attentions=[], hidden_size=32)
    failed = {result.check.operation for result in results if not result.passed}
    assert failed == {"gelu"}
    assert {result.check.operation for result in results} >= {"norm_modulate", "gelu"}
    assert kernels.elementwise(torch.zeros(1)) == "reference"


def test_a_kernel_that_breaks_the_device_is_named_and_nothing_else_blamed(monkeypatch):
    monkeypatch.setitem(attention._BACKENDS, "sdpa", broken)
    monkeypatch.setattr(numerics, "_still_runs", lambda device: False)
    with pytest.raises(RuntimeError, match=r"self_attention by sdpa .* --kernels.self-attention"):
        verify_chosen(CPU, torch.float32, attentions=[SELF])
    assert kernels.ruled_out() == {}


def test_what_is_insisted_on_stays_after_a_failure(monkeypatch):
    monkeypatch.setitem(attention._BACKENDS, "sdpa", broken)
    with kernels_as(KernelConfig(self_attention="sdpa")):
        (result,) = verify_chosen(CPU, torch.float32, attentions=[SELF])
        assert not result.passed
        assert chosen(SELF) == "sdpa"
    assert kernels.ruled_out() == {}


@pytest.mark.parametrize(("keys", "checked"), [(100, 100), (8160, 224), (65536, 256)])
def test_long_sequences_are_checked_as_shorter_ones_with_the_same_last_tile(keys, checked):
    use = AttentionUse(kind="self_attention", keys=keys, head_size=8, num_heads=2)
    (result,) = verify_chosen(CPU, torch.float32, attentions=[use])
    assert result.passed
    assert result.check.shape["N"] == checked
    assert keys % numerics.LARGEST_TILE == checked % numerics.LARGEST_TILE


def test_checks_leave_the_random_state_and_the_choices_alone():
    state, config = torch.get_rng_state(), kernels.current_kernels()
    with torch.no_grad():
        assert run_check(self_check(), CPU).passed
    assert torch.equal(torch.get_rng_state(), state)
    assert kernels.current_kernels() == config


def test_without_a_gpu_or_the_interpreter_only_pytorch_is_checked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert {check.implementation for check in checks(CPU)} == {"sdpa", "reference"}
    absent = numerics.absent(CPU)
    assert set(absent) == {"triton", "fa4", "cudnn"}
    assert all("cpu" in problem for problem in absent.values())
