"""Heads padded with zeros and cut: the same bits as plain torch."""

from __future__ import annotations

import pytest
import torch

from longtake.ops.kernels import kernels_as
from longtake.ops.resize_heads import resize_heads, resize_heads_reference
from tests.ops.elementwise_checks import DTYPES, TRITON, draw

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [96, 72, 40, 5])
@pytest.mark.parametrize("shape", [(2, 7, 3, 2, 72), (1, 72), (0, 3, 72)], ids=str)
def test_heads_are_padded_with_zeros_or_cut(shape: tuple[int, ...], size: int, dtype: torch.dtype):
    x = draw(*shape, dtype=dtype)
    with kernels_as(TRITON):
        found = resize_heads(x, size)
    assert found.equal(resize_heads_reference(x, size))
    assert found.equal(x[..., :size]) if size <= 72 else not found[..., 72:].any()
    assert found.is_contiguous()
    assert (found is x) == (size == 72)


def test_strided_heads():
    x = draw(4, 3, 2, 24)[:, 1]
    with kernels_as(TRITON):
        assert resize_heads(x, 32).equal(resize_heads_reference(x, 32))
