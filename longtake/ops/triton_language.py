"""The one place that imports Triton, which is optional: no CPU path and no other system needs it.

Kernels are written as usual, with `triton` and `tl` from here. Without Triton their decorator does
nothing, and `has_triton` keeps them from being picked.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl

    has_triton = True
except ImportError:
    has_triton = False
    # Enough for a file with kernels to be imported.
    triton: Any = SimpleNamespace(jit=lambda function: function)
    tl: Any = SimpleNamespace(constexpr=object)

# Only launches use these. A Triton that lacks them is not to pass for no Triton.
if has_triton:
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import JITFunction, driver
else:
    knobs: Any = None
    CompiledKernel: Any = None
    JITFunction: Any = None
    driver: Any = None

__all__ = ["CompiledKernel", "JITFunction", "driver", "has_triton", "knobs", "tl", "triton"]
