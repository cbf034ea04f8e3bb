import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from longtake.benchmark.graphs import count_graphs, describe_graphs
from longtake.benchmark.measure import StepOptions
from longtake.benchmark.profile import profile_step, show_profile
from longtake.benchmark.trace import PARTS
from tests.benchmark.conftest import QUICK, tiny_row


def test_profile_of_a_real_step_of_two_buckets(mesh, tmp_path):
    config = tiny_row("stdit-16x256-on-line").config
    first = config.data.buckets[0]
    buckets = (first, replace(first, num_frames=1))
    config = replace(config, data=replace(config.data, buckets=buckets))
    trace = tmp_path / "trace.json"
    options = StepOptions(protocol=QUICK, encoders="on-line")
    found = profile_step(config, mesh, options, steps=1, trace=trace)
    assert found.buckets == ("4x32x32", "1x32x32")
    assert found.micro_batches == (2, 2)
    split = found.split
    assert split.parts_ms.keys() == set(PARTS)
    assert all(split.parts_ms[part] > 0 for part in ("encode", "forward", "backward", "optimizer"))
    assert sum(split.parts_ms.values()) == pytest.approx(split.step_ms)
    assert 0 < split.step_ms < 60_000
    assert len(split.costliest) > 10
    costs = [kernel.ms for kernel in split.costliest]
    assert costs == sorted(costs, reverse=True)
    assert any("mm" in kernel.name for kernel in split.costliest)
    assert found.compiled_meanwhile == 0
    assert "longtake.backward" in trace.read_text()

    text = io.StringIO()
    show_profile(found, Console(file=text))
    assert "Steps of 4x32x32 at micro-batch 2, 1x32x32 at micro-batch 2" in text.getvalue()
    assert "graph breaks" in text.getvalue()


def test_graphs_breaks_and_recompilations_are_counted():
    torch.compiler.reset()
    before = count_graphs()

    def half(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    compiled = torch.compile(half, backend="eager", dynamic=False)
    compiled(torch.ones(2))
    once = count_graphs() - before
    assert once == 2  # before the break and after it
    compiled(torch.ones(2))
    assert count_graphs() - before == once
    compiled(torch.ones(3))  # another bucket's shape
    assert count_graphs() - before == 2 * once
    found = describe_graphs()
    assert found.compiled == count_graphs()
    assert sum(found.breaks.values()) >= 1
    reason = next(reason for reason in found.recompiled if "size mismatch" in reason)
    assert reason.count("/") == 1, "a guard by its number, without paths"
