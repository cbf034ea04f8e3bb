"""Makes Triton's interpreter compute with bfloat16 as a GPU does.

It holds bfloat16 as 16-bit integers. Left alone, `tl.dot` multiplies these integers, and a cast
from float32 cuts off the lower bits where a GPU rounds to nearest, ties to even.
"""

# Methods of a class are replaced.
# pyright: reportAttributeAccessIssue=false

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_dot = InterpreterBuilder.create_dot
_cast = InterpreterBuilder.cast_impl


def correct_bfloat16() -> None:
    """Replaces what is wrong; calling it again changes nothing."""
    InterpreterBuilder.create_dot = _dot_of_floats
    InterpreterBuilder.cast_impl = _rounding_cast


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_float32(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    # Rounding up would turn some NaNs into infinity.
    return np.where(np.isnan(values), 0x7FC0, rounded >> 16).astype(np.uint16)


def _dot_of_floats(self: Any, a: Any, b: Any, *args: Any) -> Any:
    a, b = (
        TensorHandle(to_float32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
        for x in (a, b)
    )
    return _dot(self, a, b, *args)


def _rounding_cast(self: Any, source: Any, target: Any) -> Any:
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        return TensorHandle(from_float32(source.data), tl.bfloat16)
    if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
        return TensorHandle(to_float32(source.data), tl.float32)
    return _cast(self, source, target)
