"""What a kernel is given does not depend on who launches it, Triton or what is kept of it."""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

from longtake.ops.column_sum import _sum_partials_kernel, column_sum  # noqa: E402
from longtake.ops.kernels import kernels_as  # noqa: E402
from longtake.ops.launch import launch  # noqa: E402
from tests.ops.elementwise_checks import TRITON  # noqa: E402


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
        "devices and streams are those of the thread",
        "hooks are called",
        "compiled kernels live",
    ]


def test_constants_go_by_name():
    partials, sums = torch.zeros(1, 2, 8), torch.zeros(1, 8)
    with pytest.raises(AssertionError, match=r"6 arguments by position for _sum_partials_kernel\("):
        launch(_sum_partials_kernel, (1,), partials, sums, 2, 2, 8, 2, COLUMNS=8)
    with pytest.raises(AssertionError, match="these are to be all but the constants"):
        launch(_sum_partials_kernel, (1,), partials, sums, 2, 2, F=8, ROWS=2, COLUMNS=8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_of_cuda_records_launches_on_the_stream_that_captures():
    x = torch.ones(300, 128, device="cuda")
    with kernels_as(TRITON):
        column_sum(x)  # compiled and loaded before
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = column_sum(x)
    x.fill_(2)
    graph.replay()
    assert found.equal(torch.full_like(found, 600))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_launches_wait_for_what_their_stream_waits_for():
    """Also in a backward, whose thread takes the stream of the forward."""

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, dy):
            dx = torch.ones(300, 128, device="cuda")
            torch.cuda._sleep(10**8)  # a launch on another stream would read before this is written
            dx.fill_(2)
            return column_sum(dx).expand(300, 128)

    x = torch.zeros(300, 128, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    with kernels_as(TRITON):
        column_sum(x.detach())
        with torch.cuda.stream(stream):
            Sum.apply(x).backward()
    stream.synchronize()
    assert x.grad is not None
    assert x.grad.equal(torch.full_like(x, 600))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_are_on_the_device_of_their_tensors():
    xs = [torch.full((300, 128), value, device=f"cuda:{i}") for i, value in enumerate((1.0, 2.0))]
    with kernels_as(TRITON):
        for _ in range(2):  # first to fill what is kept
            for x, total in zip(xs, (300, 600), strict=True):
                assert column_sum(x).equal(torch.full((128,), total, device=x.device))
    assert torch.cuda.current_device() == 0
