"""column_sum's kernels against float64, and how all of these kernels deal rows to programs."""

from __future__ import annotations

import pytest
import torch

from longtake.ops import column_sum as module
from longtake.ops.column_sum import block_of_columns, column_sum, column_sum_reference
from longtake.ops.elementwise import deal_rows, split_row
from longtake.ops.kernels import kernels_as
from tests.ops.elementwise_checks import DEVICE, DTYPES, TRITON, assert_close, draw

pytest.importorskip("triton")
torch.set_num_threads(1)

SHAPES = [(1, 1), (5, 13), (70, 40), (9, 1152), (3, 520), (0, 40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_sums_in_float32(shape: tuple[int, int], dtype: torch.dtype):
    x = draw(*shape, dtype=dtype)
    with kernels_as(TRITON):
        found = column_sum(x)
    assert found.dtype == column_sum_reference(x).dtype == torch.float32
    assert_close(found, x.double().sum(0))
    assert_close(column_sum_reference(x), x.double().sum(0))


@pytest.mark.parametrize("programs", [1, 7, 400])
def test_any_number_of_programs_gives_the_sum(programs: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    monkeypatch.setattr(module, "TILE_ROWS", 1)
    x = draw(300, 20)  # 300 partial sums of one row each at most, more than a tile of them
    with kernels_as(TRITON):
        assert_close(column_sum(x), x.double().sum(0))


@pytest.mark.parametrize("num_partials", [1, 2, 90], ids="{} partial sums".format)
@pytest.mark.parametrize("num_samples", [1, 3, 9], ids="{} samples".format)
def test_sums_of_all_and_of_each(num_samples: int, num_partials: int):
    """Nine samples are more than one launch takes, and 270 rows more than a tile has."""
    assert 3 < module.SAMPLES_IN_ONE_LAUNCH < 9
    of_all, of_each = partials = draw(2, num_samples, num_partials, 20)
    found = module.sum_partials_of_all_and_each(partials)
    assert found.shape == (1 + num_samples, 20)
    assert_close(found[0], of_all.double().sum((0, 1)))
    assert_close(found[1:], of_each.double().sum(1))
    assert found[0].equal(module.sum_partials(of_all.flatten(0, 1)[None])[0])
    assert found.equal(module.sum_partials_of_all_and_each(partials))


def test_float16_beyond_its_range_does_not_overflow():
    with kernels_as(TRITON):
        found = column_sum(torch.full((64, 8), 60000.0, device=DEVICE, dtype=torch.float16))
    assert found.equal(torch.full((8,), 64 * 60000.0, device=DEVICE))


def test_strided_rows():
    x = draw(12, 40).t()
    assert not x.is_contiguous()
    with kernels_as(TRITON):
        assert_close(column_sum(x), x.double().sum(0))


def test_custom_operation_is_what_it_is_registered_as():
    torch.library.opcheck(module._column_sum, (draw(20, 12, dtype=torch.bfloat16),))


def test_compiled_whole_equals_eager():
    x = draw(20, 12, dtype=torch.bfloat16)
    with kernels_as(TRITON):
        compiled = torch.compile(column_sum, fullgraph=True, backend="aot_eager")
        assert compiled(x).equal(column_sum(x))


def test_float64_keeps_its_digits_in_plain_torch_and_is_refused_by_the_kernel():
    x = draw(20, 12, dtype=torch.float64)
    assert column_sum(x).equal(x.sum(0))
    with kernels_as(TRITON), pytest.raises(ValueError, match=r"x is torch.float64.*reference"):
        column_sum(x)


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (1152, (1024, 128)),
        (768, (512, 256)),
        (384, (256, 128)),
        (1024, (1024, 0)),
        (100, (64, 64)),
        (1, (1, 0)),
    ],
)
def test_row_is_two_powers_of_two(width: int, parts: tuple[int, int]):
    assert split_row(width) == parts


@pytest.mark.parametrize("num_rows", [0, 1, 4, 5, 255, 256, 257, 65_536, 2_937_600])
@pytest.mark.parametrize("num_samples", [1, 3, 128, 5000])
def test_every_row_is_dealt_once_and_no_program_is_idle(num_rows: int, num_samples: int):
    rows, chunks = deal_rows(num_rows, num_samples, multiple=4, programs=1536)
    assert rows % 4 == 0
    assert rows * (chunks - 1) < max(num_rows, 1) <= rows * chunks
    assert num_samples * chunks <= max(1536, num_samples)


@pytest.mark.parametrize(
    ("width", "block"), [(4608, 512), (3456, 512), (1152, 256), (768, 256), (384, 128), (40, 128)]
)
def test_blocks_of_columns_waste_little(width: int, block: int):
    assert block_of_columns(width) == block
