"""Compiles kernels for a GPU that need not be there, and says what they take on it.

Inside `compile_only` a Triton launch with CPU tensors compiles the kernel for the target instead of
running it (outputs stay as they were allocated):

    with compile_only() as compiled:
        my_launcher(q, k, v)
    assert not compiled["_my_kernel"].spills

It must run in a process without TRITON_INTERPRET, see `tests/ops/test_compiled_kernels.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes."""

    registers: int  # per thread; 255 is the most there is
    spills: int  # instructions that store registers to local memory, for want of registers
    shared: int  # bytes of shared memory per program; sm_90 has 232,448
    tensor_core: int  # matrix instructions in the machine code
    num_warps: int
    grid: tuple[int, ...]


@contextmanager
def compile_only(capability: int = 90) -> Iterator[dict[str, Compiled]]:
    """Launches compile for this compute capability and are recorded under the kernel's name; the
    second launch of a kernel is `name#2`, and so on."""
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "interpreted kernels cannot be compiled"
    found: dict[str, Compiled] = {}

    def run(
        kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any
    ) -> None:
        names = [param.name for param in kernel.params]
        values = dict(zip(names, args, strict=False)) | {
            name: kwargs.pop(name) for name in names if name in kwargs
        }
        for param in kernel.params:
            if param.name not in values:
                values[param.name] = param.default
        signature, constants, attributes = {}, {}, {}
        for index, param in enumerate(kernel.params):
            value = values[param.name]
            kind, is_aligned = _type_of(value, is_constant=param.is_constexpr)
            signature[param.name] = kind
            if kind == "constexpr":
                constants[(index,)] = value
            elif is_aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=options)
        sizes = grid(values) if callable(grid) else grid
        name, count = kernel.fn.__name__, 2
        while name in found:
            name, count = f"{kernel.fn.__name__}#{count}", count + 1
        found[name] = _resources(compiled, capability, tuple(sizes))

    original = JITFunction.run
    JITFunction.run = run  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield found
    finally:
        JITFunction.run = original


def _type_of(value: Any, *, is_constant: bool) -> tuple[str, bool]:
    """Triton's name of an argument's type, and whether it may take 16 to divide it."""
    if is_constant or value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        if value == 1:
            return "constexpr", False  # as Triton itself does
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"no signature for {type(value)}")


def _resources(compiled: Any, capability: int, grid: tuple[int, ...]) -> Compiled:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run(
            [tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True
        ).stdout
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    spills = len(re.findall(r"\bSTL(?:\.\w+)*\b", code))
    return Compiled(
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        tensor_core=len(re.findall(r"\b(?:HGMMA|HMMA)\b", code)),
        num_warps=compiled.metadata.num_warps,
        grid=grid,
    )
