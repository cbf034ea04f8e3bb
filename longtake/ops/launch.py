"""The one way a kernel is launched: what Triton finds out anew at every launch is kept.

For each launch Triton asks what the kernel is to be compiled for, looks at switches of the process
and binds arguments to names, which takes the host longer than a small kernel runs.
Yet what it decides by is little: the types of arguments, whether 16 divides addresses and numbers,
and constants. Under that key the compiled kernel is kept here and given its arguments directly.

What this gives up: Triton compares the globals that a kernel reads with those it was compiled with,
and reads switches that alter compilation (TRITON_DEBUG); both now happen at a key's first launch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from longtake.ops.triton_language import CompiledKernel, JITFunction, driver, knobs


class _Launcher(NamedTuple):
    """A compiled kernel, loaded on one device."""

    kernel: object  # what it is compiled from, held as the key is by its `id`
    compiled: object  # held, as CUDA's handle is valid no longer than it lives
    run: Callable[..., None]
    function: int  # CUDA's handle
    metadata: object  # warps and shared memory, packed as `run` takes them
    constants: tuple[Any, ...]  # in the order of the kernel's parameters; `run` skips them


_LAUNCHERS: dict[tuple[Any, ...], _Launcher] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)` on the device of the first argument, a tensor.

    Arguments that vary go by position. By name go all of the kernel's `tl.constexpr` parameters,
    which come last in its signature, and options like `num_warps`.
    """
    device = args[0].get_device()
    if device < 0:  # on a CPU, in Triton's interpreter
        _constants_in_order(kernel, args, constants)
        kernel[grid](*args, **constants)
    elif device == torch.cuda.current_device():
        _launch_on(device, kernel, grid, args, constants)
    else:
        with torch.cuda.device(device):
            _launch_on(device, kernel, grid, args, constants)


def _launch_on(
    device: int,
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """Launches on the current device, whose index is given."""
    key = _key(device, kernel, args, constants)
    launcher = None if key is None or _is_watched(kernel) else _LAUNCHERS.get(key)
    if launcher is not None:
        _, _, run, function, metadata, in_order = launcher
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)  # pyright: ignore
        # Without metadata of the launch and hooks, which are for profilers: see `_is_watched`.
        run(x, y, z, stream, function, metadata, None, None, None, *args, *in_order)
        return
    compiled: Any = kernel[grid](*args, **constants)
    if key is not None and isinstance(compiled, CompiledKernel):
        in_order = _constants_in_order(kernel, args, constants)
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        assert run is not None
        assert function is not None, "a kernel that was launched is loaded"
        _LAUNCHERS[key] = _Launcher(kernel, compiled, run, function, metadata, in_order)


def _key(
    device: int, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, ...] | None:
    """What decides which code a launch runs, at least as finely as Triton does for CUDA; None if
    this is a launch to be left to Triton."""
    if type(kernel) is not JITFunction or torch.version.hip:
        return None
    # The kernel's own hash is one of its source, slow; and a function may have several kernels.
    key: list[Any] = [id(kernel), device]
    add = key.append
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            add(x.dtype)
            add(x.data_ptr() & 15 == 0)
        elif kind is int:
            if x == 1:  # becomes a constant
                add(1)
            elif -(2**31) <= x < 2**31:  # int32
                add(2 if x & 15 else 3)
            elif x < 2**63:  # int64
                add(4 if x & 15 else 5)
            else:  # uint64
                add(6 if x & 15 else 7)
        elif x is None or kind is float or kind is bool:
            add(kind)
        else:
            return None
    return (*key, *constants, *constants.values())


def _is_watched(kernel: Any) -> bool:
    """Whether hooks are to be called around a launch, as a profiler like Proton sets them."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    calls = getattr(enter, "calls", enter), getattr(leave, "calls", leave)
    return bool(kernel.pre_run_hooks or calls[0] or calls[1])


def _constants_in_order(
    kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, ...]:
    """The values of all parameters that are constants, which `launch` takes by name."""
    parameters = list(inspect.signature(kernel.fn).parameters.values())
    is_constant = ["constexpr" in str(x.annotation) for x in parameters]
    assert is_constant == [index >= len(args) for index in range(len(parameters))], (
        f"{len(args)} arguments by position for {kernel.fn.__name__}"
        f"({', '.join(x.name for x in parameters)}): these are to be all but the constants"
    )
    return tuple(constants.get(x.name, x.default) for x in parameters[len(args) :])
