"""What a kernel is given does not depend on who launches it, Triton or what is kept of it."""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

from longtake.ops.column_sum import _sum_partials_kernel  # noqa: E402
from longtake.ops.launch import launch  # noqa: E402


def test_launches_are_those_of_triton():
    """In a process of its own, where kernels are compiled and not interpreted."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.recorded_launches"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "the same reaches the GPU",
        "keys are as fine as Triton's",
        "hooks are called",
    ]


def test_constants_go_by_name():
    partials, sums = torch.zeros(1, 2, 8), torch.zeros(1, 8)
    with pytest.raises(AssertionError, match=r"5 arguments by position for _sum_partials_kernel\("):
        launch(_sum_partials_kernel, (1,), partials, sums, 2, 8, 2, COLUMNS=8)
    with pytest.raises(AssertionError, match="these are to be all but the constants"):
        launch(_sum_partials_kernel, (1,), partials, sums, 2, F=8, ROWS=2, COLUMNS=8)
