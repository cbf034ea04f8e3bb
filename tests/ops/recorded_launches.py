"""Launches without a GPU: kernels are compiled for one, and what would reach it is recorded.

Run by `tests/ops/test_launch.py` in a process without TRITON_INTERPRET. Prints a line for each
check that held, and with `--time` the host's time for a launch, by Triton and by `launch`.
"""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from longtake.ops import launch as module
from longtake.ops.gated_residual import _gated_residual_backward_kernel as backward_kernel
from longtake.ops.launch import _key, _launch_on
from longtake.ops.triton_language import knobs, tl

DEVICE = 0


class Current(threading.local):
    """Each thread has a device of its own, and a stream on each, as with CUDA."""

    device = DEVICE
    stream_offset = 7

    def stream(self, device: int) -> int:
        return 100 * device + self.stream_offset


current = Current()


class Recorder:
    """In place of the code that Triton makes to hand arguments to CUDA."""

    launches: list[tuple[Any, ...]] = []  # noqa: RUF012

    def __init__(self, source: Any, metadata: Any) -> None:
        # What CUDA would be given: neither constants nor numbers that became constants.
        self.is_given = [kind != "constexpr" for kind in source.signature.values()]

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        packed, _, enter, leave, *args = rest
        for hook in (enter, leave):
            if hook is not None:
                hook(None)
        assert len(args) == len(self.is_given)
        given = [arg for arg, is_given in zip(args, self.is_given, strict=True) if is_given]
        self.launches.append((x, y, z, stream, function, packed, *given))


def use_recording_driver() -> None:
    handles = itertools.count(1)
    utils = SimpleNamespace(
        load_binary=lambda *_: (object(), next(handles), 32, 0, 1024),
        unload_module=lambda _: None,
        get_device_properties=lambda _: {"max_shared_mem": 232_448},
    )
    driver = SimpleNamespace(
        utils=utils,
        launcher_cls=Recorder,
        get_current_device=lambda: current.device,
        get_current_stream=current.stream,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    triton.runtime.driver.set_active(driver)


def problems() -> Iterator[tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]:
    """(what is particular, grid, arguments, constants) for the gated residual's backward."""
    half, rows = torch.bfloat16, 5

    def tokens(dtype: torch.dtype, *, is_aligned: bool = True) -> torch.Tensor:
        return torch.zeros(rows * 128 + 1, dtype=dtype)[0 if is_aligned else 1 :]

    sums = torch.zeros(2 * 128)
    constants = {"D": 128, "HEAD": 128, "TAIL": 0, "STAGES": 3, "num_warps": 1}
    plain = (tokens(half), tokens(half), tokens(half), tokens(half), sums)
    yield "all aligned", (8,), (*plain, 16, 128, 4, 2), constants
    yield "other numbers of a kind", (6, 2), (*plain, 32, 1280, 5, 3), constants
    yield "no programs", (0,), (*plain, 16, 128, 4, 2), constants
    empty = torch.zeros(0, dtype=half)
    yield "a tensor without elements", (8,), (*plain[:3], empty, sums, 16, 128, 4, 2), constants
    yield "a number that is 1", (8, 2, 3), (*plain, 16, 128, 4, 1), constants
    yield "a number of 64 bits", (8,), (*plain, 16, 2**31, 4, 2), constants
    odd = (tokens(half, is_aligned=False), *plain[1:])
    yield "a tensor not aligned", (8,), (*odd, 16, 128, 4, 2), constants
    without_y = (plain[0], plain[1], None, *plain[3:])
    yield "without y", (8,), (*without_y, 16, 128, 4, 2), constants
    mixed = (plain[0], torch.nn.Parameter(torch.zeros(128)), *plain[2:])
    yield "a parameter in float32", (8,), (*mixed, 16, 128, 4, 2), constants
    yield "other warps", (8,), (*plain, 16, 128, 4, 2), constants | {"num_warps": 2}
    yield "other stages", (8,), (*plain, 16, 128, 4, 2), constants | {"STAGES": 2}


def recorded(run: Callable[..., object], *args: Any, **kwargs: Any) -> list[tuple[Any, ...]]:
    Recorder.launches.clear()
    run(*args, **kwargs)
    return list(Recorder.launches)


def check_what_reaches_the_gpu() -> None:
    for _ in range(2):  # first to fill what is kept
        for name, grid, args, constants in problems():
            known = len(module._LAUNCHERS)
            ours = recorded(_launch_on, DEVICE, backward_kernel, grid, args, constants)
            theirs = recorded(backward_kernel[grid], *args, **constants)
            assert len(ours) == len(theirs) == 1, name
            assert all(a is b or a == b for a, b in zip(ours[0], theirs[0], strict=True)), name
            assert len(ours[0]) == len(theirs[0]), name
    assert len(module._LAUNCHERS) == known == len(list(problems())) - 3, "each compiled once"


def check_keys_part_launches_as_triton_does() -> None:
    """Launches of the same key are of the same code to Triton."""

    @triton.jit
    def kernel(x, y, z, CONSTANT: tl.constexpr):
        pass

    store = torch.zeros(512, dtype=torch.uint8)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32)
    dtypes = (*dtypes, torch.int64, torch.bool, torch.uint8, torch.int8, torch.int16)
    tensors = [store[start : start + 256].view(t) for t in dtypes for start in (0, 8, 16)]
    powers = [2**n for n in (4, 15, 31, 32, 62, 63)]
    ints = [i for p in powers for i in (p - 1, p, p + 1, p + 16, -p, -p - 1) if i >= -(2**63)]
    numbers = [*ints, 0, 1, 2, 3, -1, -16, 15, 17, 2**64 - 1, 0.0, 1.0, 16.0, True, False]
    values = [*tensors, *numbers, torch.zeros(0), torch.nn.Parameter(torch.zeros(8)), None]
    backend, binder = kernel.device_caches[DEVICE][3:]
    assert backend.binary_ext == "cubin"
    code_of: dict[Any, Any] = {}
    constants = ({"CONSTANT": 1}, {"CONSTANT": 16}, {"CONSTANT": "ieee"}, {"CONSTANT": tl.float32})
    pairs = [(v, w, 2) for v in values for w in (values[0], values[1], 1, 16, 7, None)]
    for args in (*pairs, *((w, v, 16) for v, w, _ in pairs), *((None, 3, v) for v in values)):
        for named in (*constants, {"CONSTANT": 1, "num_warps": 8}, {"CONSTANT": 1, "num_warps": 2}):
            key = _key(DEVICE, kernel, args, named)
            assert key is not None
            _, specialization, options = binder(*args, **named)
            code = str(specialization), str(options)
            assert code_of.setdefault(key, code) == code, (args, named)
    # And not much finer, or a kernel would be launched by Triton again and again.
    assert len(code_of) == len({*code_of.values()})


def check_devices_and_streams() -> None:
    """Those of the thread that launches, at each launch: a backward runs in a thread of its own."""
    _, grid, args, constants = next(iter(problems()))

    def launched(device: int, stream_offset: int) -> tuple[int, int]:
        current.device, current.stream_offset = device, stream_offset
        (launch,) = recorded(_launch_on, device, backward_kernel, grid, args, constants)
        return launch[3:5]

    found: list[tuple[int, int]] = []
    for _ in range(2):  # first to fill what is kept
        wanted = [(DEVICE, 7), (DEVICE, 9), (1, 7), (1, 9)]
        found = [launched(*each) for each in wanted]
        assert [stream for stream, _ in found] == [7, 9, 107, 109]
    functions = [function for _, function in found]
    assert functions[0] == functions[1] != functions[2] == functions[3], "loaded on each device"
    thread = threading.Thread(target=lambda: found.append(launched(DEVICE, 11)))
    thread.start()
    thread.join()
    assert found[-1] == (11, functions[0])
    assert launched(1, current.stream_offset) == found[3], "the other thread has changed nothing"
    current.device, current.stream_offset = DEVICE, 7


def check_compiled_kernels_live() -> None:
    """A handle is good as long as its compiled kernel lives, which Triton may forget."""
    _, grid, args, constants = next(iter(problems()))
    (before,) = recorded(_launch_on, DEVICE, backward_kernel, grid, args, constants)
    compiled = weakref.ref(backward_kernel[grid](*args, **constants))
    backward_kernel.device_caches.clear()
    gc.collect()
    assert compiled() is not None
    (after,) = recorded(_launch_on, DEVICE, backward_kernel, grid, args, constants)
    assert before == after


def check_kernels_of_one_function_are_told_apart() -> None:
    def function(x, CONSTANT: tl.constexpr):
        pass

    kernels = triton.jit(function), triton.jit(function, debug=True)
    keys = {_key(DEVICE, kernel, (1,), {"CONSTANT": 1}) for kernel in kernels}
    assert len(keys) == len(kernels)


def check_what_is_left_to_triton() -> None:
    name, grid, args, constants = next(iter(problems()))
    calls = []
    launched_by_triton = []
    run = JITFunction.run

    def counting_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched_by_triton.append(self)
        return run(self, *args, **kwargs)

    JITFunction.run = counting_run  # pyright: ignore[reportAttributeAccessIssue]
    try:
        _launch_on(DEVICE, backward_kernel, grid, args, constants)
        assert not launched_by_triton, name
        knobs.runtime.launch_enter_hook.add(calls.append)
        _launch_on(DEVICE, backward_kernel, grid, args, constants)
        assert len(calls) == len(launched_by_triton) == 1, "a profiler's hook"
        knobs.runtime.launch_enter_hook.remove(calls.append)
        _launch_on(DEVICE, backward_kernel, grid, args, constants)
        assert len(calls) == len(launched_by_triton) == 1
    finally:
        JITFunction.run = run
    assert _key(DEVICE, triton.autotune([triton.Config({})], [])(backward_kernel), (1,), {}) is None
    assert _key(DEVICE, backward_kernel, ((1, 2),), {}) is None


def microseconds(run: Callable[[], object]) -> float:
    """The best of some rounds."""

    def once(times: int = 500) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            run()
        Recorder.launches.clear()
        return (time.perf_counter() - begin) / times * 1e6

    return min(once() for _ in range(9))


def main() -> None:
    use_recording_driver()
    check_what_reaches_the_gpu()
    print("the same reaches the GPU")
    check_keys_part_launches_as_triton_does()
    check_kernels_of_one_function_are_told_apart()
    print("keys are as fine as Triton's")
    check_devices_and_streams()
    print("devices and streams are those of the thread")
    check_what_is_left_to_triton()
    print("hooks are called")
    check_compiled_kernels_live()
    print("compiled kernels live")
    if "--time" in sys.argv:
        _, grid, args, constants = next(iter(problems()))
        empty = microseconds(lambda: None)
        by_triton = microseconds(lambda: backward_kernel[grid](*args, **constants)) - empty
        ours = microseconds(lambda: _launch_on(DEVICE, backward_kernel, grid, args, constants))
        print(f"Triton {triton.__version__}: {by_triton:.1f} us, launch {ours - empty:.1f} us")


if __name__ == "__main__":
    main()
