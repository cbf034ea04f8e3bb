"""Sharded, replicated, accumulated, checkpointed, compiled: always the loss and gradients of one
process."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.parallel import (
    ParallelConfig,
    build_mesh,
    drop_gathered,
    local_part,
    materialize,
    mean_over_processes,
    parallelize,
    read_full,
    start_distributed,
    sync_gradients,
    write_full,
)
from longtake.parallel.shard import _NothingToScatter
from tests.processes import run_in_processes
from tests.toy_model import ToyModel, init_toy, toy_batch, toy_loss

LAYOUTS = {
    "one": (1, ParallelConfig()),
    "shard-2": (2, ParallelConfig()),
    "shard-4": (4, ParallelConfig(zero=2)),
    "hybrid-2x2": (4, ParallelConfig(dp_replicate=2)),
    "replicate-2": (2, ParallelConfig(dp_replicate=2, dp_shard=1)),
    "checkpointed": (2, ParallelConfig(checkpointing="full")),
}


def reference(param_dtype: torch.dtype = torch.float32):
    """Loss and gradients in plain PyTorch."""
    model = ToyModel()
    init_toy(model, lambda tensor, full: tensor.data.copy_(full))
    loss = toy_loss(model, toy_batch(0))
    loss.backward()
    return float(loss.detach()), {name: param.grad for name, param in model.named_parameters()}


def _one_step(config: ParallelConfig, num_micro_batches: int = 1):
    mesh = build_mesh(config, start_distributed("cpu"))
    with torch.device("meta"):
        model = ToyModel()
    parallelize(model, mesh, config)
    materialize(model, mesh.device)
    nan_before = all(bool(local_part(p).isnan().all()) for p in model.parameters())
    init_toy(model, write_full)
    # What init wrote must survive the first forward's laying out of the shards.
    weights = {name: read_full(param) for name, param in model.named_parameters()}

    own = toy_batch(0).chunk(mesh.dp_size)[mesh.dp_rank]
    losses = []
    for index, micro_batch in enumerate(own.chunk(num_micro_batches)):
        sync_gradients(model, is_last=index == num_micro_batches - 1)
        loss = toy_loss(model, micro_batch) / num_micro_batches
        loss.backward()
        losses.append(loss.detach())
    drop_gathered(model)  # a lone shard shows what is gathered, whose gradients are elsewhere
    gradients = {name: param.grad for name, param in model.named_parameters()}
    return {
        "loss": float(mean_over_processes(torch.stack(losses).sum())),
        "gradients": {name: read_full(grad) for name, grad in gradients.items()},
        "gradient_dtypes": {grad.dtype for grad in gradients.values()},
        "weights": weights,
        "nan_before": nan_before,
        "local_values": sum(local_part(param).numel() for param in model.parameters()),
    }


def assert_same(found, expected_loss, expected_gradients, *, tolerance=1e-6):
    assert found["loss"] == pytest.approx(expected_loss, rel=tolerance)
    assert found["gradients"].keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        error = (found["gradients"][name] - gradient).norm() / gradient.norm()
        assert error <= tolerance, f"{name}: relative error {error}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_one_process(layout):
    world_size, config = LAYOUTS[layout]
    loss, gradients = reference()
    results = run_in_processes(_one_step, world_size, config)
    for found in results:
        assert_same(found, loss, gradients)
        assert found["nan_before"], "materialize leaves something that looks initialized"
    total = sum(gradient.numel() for gradient in gradients.values())
    copies = config.dp_replicate
    assert sum(found["local_values"] for found in results) == total * copies


def test_accumulated_micro_batches_equal_one_big_batch():
    loss, gradients = reference()
    for found in run_in_processes(_one_step, 2, ParallelConfig(), 4):
        assert_same(found, loss, gradients)


def test_bf16_computes_in_bf16_and_reduces_in_fp32():
    loss, gradients = reference()
    alone = run_in_processes(_one_step, 1, ParallelConfig(param_dtype="bf16"))[0]
    spread = run_in_processes(_one_step, 4, ParallelConfig(param_dtype="bf16"))[0]
    accumulated = run_in_processes(_one_step, 2, ParallelConfig(param_dtype="bf16"), 4)[0]
    for found in (alone, spread, accumulated):
        assert found["gradient_dtypes"] == {torch.float32}
        assert_same(found, loss, gradients, tolerance=3e-2)
        assert found["loss"] != loss, "this was computed in fp32"
    # Samples are summed in fp32 between processes and micro-batches, in bf16 within one: 8 bits.
    assert_same(spread, alone["loss"], alone["gradients"], tolerance=1e-2)


class _Copies(TorchDispatchMode):
    """Counts copies from one fp32 tensor to another."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            to, source = args[:2]
            is_moved = to.dtype == source.dtype == torch.float32 and to.data_ptr() != (
                source.data_ptr()
            )
            self.count += is_moved
        return func(*args, **(kwargs or {}))


def _copies_of_a_backward(config: ParallelConfig):
    mesh = build_mesh(config, start_distributed("cpu"))
    model = parallelize(ToyModel(), mesh, config)
    init_toy(model, write_full)
    counts = []
    for is_last in (False, True):
        sync_gradients(model, is_last=is_last)
        loss = toy_loss(model, toy_batch(0))
        with _Copies() as copies:
            loss.backward()
        counts.append(copies.count)
    return counts


def test_a_lone_shards_gradients_are_not_copied_to_be_summed():
    assert run_in_processes(_copies_of_a_backward, 1, ParallelConfig(param_dtype="bf16"))[0] == [
        0,
        0,
    ]


def test_memory_of_a_reduction_that_breaks_off_is_not_taken_for_the_next_ones():
    comm, asked = _NothingToScatter(), {"dtype": torch.float32, "device": torch.device("cpu")}
    given = comm.allocate((8,), **asked)
    assert comm.allocate((8,), **asked) is given
    broken_off = comm.allocate((8,), **asked)
    assert broken_off is not given
    del broken_off  # with the call that raised
    given = comm.allocate((8,), **asked)
    assert comm.allocate((8,), **asked) is given
    assert comm.allocate((9,), **asked).shape == (9,)
    assert comm.allocate((8,), **asked).shape == (8,)


def test_initial_weights_do_not_depend_on_the_number_of_processes():
    one = run_in_processes(_one_step, 1, ParallelConfig())[0]["weights"]
    three = run_in_processes(_one_step_three, 3)[0]
    for name, weight in one.items():
        assert torch.equal(weight, three[name]), name


def _one_step_three():
    mesh = build_mesh(ParallelConfig(), start_distributed("cpu"))
    with torch.device("meta"):
        model = ToyModel()
    parallelize(model, mesh, ParallelConfig())
    materialize(model, mesh.device)
    init_toy(model, write_full)
    return {name: read_full(param) for name, param in model.named_parameters()}


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients():
    loss, gradients = reference()
    for found in run_in_processes(_compiled_step, 2, timeout_seconds=200):
        assert_same(found, loss, gradients, tolerance=1e-5)
        assert found["graphs"] > 0


def _compiled_step():
    from longtake.parallel import parallelize as module  # noqa: F401
    from longtake.parallel.compile import compile_blocks

    # Tracing is what could fail around FSDP; generating C++ on top would only take time.
    graphs = []

    def count_graphs(graph, inputs):
        graphs.append(graph)
        return graph.forward

    import sys

    orchestrator = sys.modules["longtake.parallel.parallelize"]
    orchestrator.compile_blocks = lambda blocks: compile_blocks(blocks, backend=count_graphs)
    found = _one_step(ParallelConfig(compile=True, checkpointing="full"))
    return found | {"graphs": len(graphs)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_blocks_sum_over_the_tokens_of_one_sample():
    """A compiler's kernel that sums over channels and tokens at once got shift and scale wrong."""
    from longtake.ops.norm_modulate import norm_modulate_reference
    from longtake.parallel.compile import compile_blocks

    class Branch(nn.Module):
        def forward(self, x_BND, shift_B1D, scale_B1D):
            return norm_modulate_reference(x_BND, shift_B1D, scale_B1D)

    generator = torch.Generator("cuda").manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device="cuda")
    shapes = (1, 65_536, 1152), (1, 1, 1152), (1, 1, 1152)
    inputs = [draw(shape).bfloat16().requires_grad_() for shape in shapes]
    incoming = draw(shapes[0]).bfloat16()
    compiled = Branch()
    compile_blocks([compiled])
    expected, found = (
        torch.autograd.grad(block(*inputs), inputs, incoming) for block in (Branch(), compiled)
    )
    for right, gradient in zip(expected, found, strict=True):
        error = (gradient.float() - right.float()).norm() / right.float().norm()
        assert float(error) < 0.01


def _change_after_inference():
    config = ParallelConfig()
    mesh = build_mesh(config, start_distributed("cpu"))
    with torch.device("meta"):
        model = ToyModel()
    parallelize(model, mesh, config)
    materialize(model, mesh.device)
    init_toy(model, write_full)
    params = dict(model.named_parameters())
    with torch.no_grad():
        before = model(toy_batch(0))
    write_full(params["head.bias"], torch.full((4,), 100.0))
    drop_gathered(model)
    with torch.no_grad():
        return float((model(toy_batch(0)) - before).mean())


def test_weights_changed_after_inference_are_used():
    assert run_in_processes(_change_after_inference, 2)[0] == pytest.approx(100, abs=2)


def test_write_full_refuses_another_shape():
    with pytest.raises(ValueError, match=r"shape \(3,\) does not fit \(4,\)"):
        write_full(torch.zeros(4), torch.zeros(3))


def test_a_buffer_that_would_be_lost_is_refused():
    model = ToyModel()
    model.register_buffer("positions", torch.zeros(2), persistent=False)
    with pytest.raises(AssertionError, match="buffer positions is not persistent"):
        materialize(model, torch.device("cpu"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kept_blocks": 3}, "kept_blocks=3: the model has 2 blocks"),
        ({"kept_inputs": 3}, "kept_inputs=3: 2 of the model's 2 blocks are checkpointed"),
        ({"kept_blocks": 1, "kept_inputs": 2}, "kept_inputs=2: 1 of the model's 2 blocks"),
    ],
)
def test_more_blocks_than_there_are_cannot_keep_anything(fields, words):
    config = ParallelConfig(checkpointing="full", offload=True, **fields)
    mesh = None  # not looked at before
    with pytest.raises(ValueError, match=words):
        parallelize(ToyModel(), mesh, config)
