"""What is computed alike by one process and by a group that shares the tokens: inputs, losses,
gradients and short runs."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.diffusion import DiffusionConfig, build_objective
from longtake.models import build_model, init_weights
from longtake.ops import attended
from longtake.ops.kernels import PLAIN, KernelConfig, kernels_as
from longtake.parallel import (
    Mesh,
    ParallelConfig,
    branches,
    build_mesh,
    drop_gathered,
    is_compiled,
    materialize,
    mean_over_processes,
    parallelize,
    read_full,
    start_distributed,
    sync_gradients,
    write_full,
)
from longtake.parallel.activation_checkpointing import checkpoint_blocks
from longtake.parallel.compile import compile_blocks
from longtake.parallel.sequence import split_sequence
from longtake.pipeline import Inputs, Trainee, training_loss, training_step
from longtake.randomness import SampleKeys, named_seed
from longtake.training import Ema, EmaConfig, OptimizerConfig, build_optimizer

NAMES = ("dit", "pixart", "stdit", "stdit2", "latte")
BATCH = 4
CAPTION = 5
SIZES = {"hidden_size": 32, "depth": 2, "caption_channels": 8, "num_classes": 3}

EVEN = (4, 4, 8)
"""Latent frames, rows and columns: 4 patches in time, 8 in space."""
UNEVEN = (3, 6, 6)
"""3 and 9: neither divides by 2, and of 4 processes one has no frame."""
IMAGE = (1, 4, 6)

FUSED = KernelConfig(
    elementwise="triton",
    self_attention="triton",
    temporal_attention="triton",
    cross_attention="triton",
)


@dataclass(frozen=True)
class Case:
    """A model, what it is trained for, and the shape of its latents."""

    model: str
    objective: str = "flow"
    latents: tuple[int, int, int] = UNEVEN
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    num_heads: int = 4
    depth: int = SIZES["depth"]
    accumulation: int = 1
    kernels: KernelConfig = PLAIN
    piece_tokens: int = branches.PIECE_TOKENS
    """Of branches that run in pieces."""
    kept_keys: int = attended.KEPT_KEYS
    """From which on what attention found is kept in them."""

    def on(self, **parallel: Any) -> Case:
        """The same, spread like this."""
        return replace(self, parallel=ParallelConfig(**parallel))


def objective_of(case: Case):
    return build_objective(DiffusionConfig(objective=case.objective))  # type: ignore[arg-type]


def build(case: Case):
    return build_model(
        case.model,  # type: ignore[arg-type]
        size="tiny",
        max_caption_tokens=CAPTION,
        learn_sigma=case.objective == "iddpm",
        num_heads=case.num_heads,
        **{**SIZES, "depth": case.depth},
    )


def checkpointed(case: Case, policy: str, *, dtype=torch.float64, **options):
    """The case's model on one process, its blocks checkpointed."""
    model = build(case).to(dtype)
    init_weights(model, seed=0, write=write_shaken)
    names = list(dict(model.named_parameters()))
    checkpoint_blocks(model.blocks, policy, **options)  # type: ignore[arg-type]
    assert list(dict(model.named_parameters())) == names
    return model


def write_shaken(param: torch.Tensor, full: torch.Tensor) -> None:
    """Zero-initialized gates would hide whole branches: move every weight off zero."""
    generator = torch.Generator().manual_seed(full.numel())
    write_full(param, full + 0.05 * torch.randn(full.shape, generator=generator))


def inputs_of(case: Case, samples: range, step: int = 0, dtype=torch.float32) -> Inputs:
    """These of the `BATCH` samples of a step, whoever asks; captions are ragged, one empty."""

    def draw(name: str, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(named_seed(step, name))
        return torch.randn(BATCH, *shape, generator=generator)[samples.start : samples.stop]

    own = slice(samples.start, samples.stop)
    if case.model in ("dit", "latte"):
        condition = {"labels_B": torch.tensor([0, 2, 1, 2])[own]}
    else:
        lengths_B = torch.tensor([3, CAPTION, 0, 1])[own]
        condition = {
            "prompt_embeds_BLK": draw("text", CAPTION, SIZES["caption_channels"]).to(dtype),
            "prompt_mask_BL": torch.arange(CAPTION) < lengths_B[:, None],
        }
    count = len(samples)
    ids_B = torch.arange(samples.start, samples.stop) + BATCH * step
    return Inputs(
        clean_BCTHW=draw("latents", 4, *case.latents).to(dtype),
        condition=condition,
        keys=SampleKeys(7, torch.zeros(count, dtype=torch.int64), ids_B),
        pixel_size=(8 * case.latents[1], 8 * case.latents[2]),
        weights_B=torch.ones(count),
    )


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    return replace(
        inputs,
        clean_BCTHW=inputs.clean_BCTHW.to(device),
        condition={name: x.to(device) for name, x in inputs.condition.items()},
        keys=inputs.keys.to(device),
        weights_B=inputs.weights_B.to(device),
    )


def loss_of(model, case: Case, inputs: Inputs) -> torch.Tensor:
    # Some conditions are dropped: that is drawn by sample, too.
    losses_B = training_loss(model, objective_of(case), inputs, condition_dropout=0.4)
    return losses_B.mean()


@functools.cache
def alone(case: Case, dtype=torch.float32) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in plain PyTorch, of the whole batch."""
    model = build(case).to(dtype)
    init_weights(model, seed=0, write=write_shaken)
    loss = loss_of(model, case, inputs_of(case, range(BATCH), dtype=dtype))
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


def in_double(cases: list[Case]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Loss and gradients in float64, averaged over all processes as FSDP does."""
    device = start_distributed("cpu")
    results = []
    for case in cases:
        mesh = build_mesh(case.parallel, device)
        model = build(case).double()
        init_weights(model, seed=0, write=write_shaken)
        names = [name for name, _ in model.named_parameters()]
        if mesh.token_group is not None:
            in_halves = case.parallel.exchange_in_halves
            split_sequence(model, mesh.token_group, in_halves=in_halves)
        assert [name for name, _ in model.named_parameters()] == names
        inputs = inputs_of(case, _own_samples(mesh), dtype=torch.float64)
        loss = loss_of(model, case, inputs)
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for gradient in gradients.values():
            dist.all_reduce(gradient, op=dist.ReduceOp.AVG)
        same = [torch.zeros_like(loss) for _ in range(mesh.world_size)]
        dist.all_gather(same, loss.detach())
        first = mesh.rank // mesh.sp * mesh.sp
        assert all(torch.equal(one, loss) for one in same[first : first + mesh.sp])
        results.append((float(mean_over_processes(loss)), gradients))
    return results


def sharded(
    cases: list[Case], kind: Literal["cpu", "cuda"] = "cpu"
) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Loss and gradients through `parallelize`, in float32 unless the case says otherwise."""
    device = start_distributed(kind)
    if kind == "cpu":
        _compile_quickly()
    results = []
    for case in cases:
        # Else a block of an earlier case needs no graph, and a ninth kind of block gets none.
        torch._dynamo.reset()
        branches.PIECE_TOKENS = case.piece_tokens
        attended.KEPT_KEYS = case.kept_keys
        mesh = build_mesh(case.parallel, device)
        model = parallel_model(case, mesh)
        own, loss = _own_samples(mesh), torch.zeros((), device=device)
        count = len(own) // case.accumulation
        for number in range(case.accumulation):
            sync_gradients(model, is_last=number == case.accumulation - 1)
            first = own.start + number * count
            with kernels_as(case.kernels):
                inputs = to_device(inputs_of(case, range(first, first + count)), device)
                part = loss_of(model, case, inputs)
                (part / case.accumulation).backward()
            loss += part.detach() / case.accumulation
        drop_gathered(model)
        gradients = {
            n: read_full(p.grad).cpu() for n, p in model.named_parameters() if p.grad is not None
        }
        graphs = torch._dynamo.utils.counters["stats"].pop("unique_graphs", 0)
        assert (graphs > 0) == is_compiled(case.parallel, device)
        results.append((float(mean_over_processes(loss)), gradients))
    return results


def _compile_quickly() -> None:
    # What fails in compilation fails while tracing; generating C++ would only take time.
    orchestrator = sys.modules["longtake.parallel.parallelize"]
    quickly = functools.partial(compile_blocks, backend="aot_eager")
    orchestrator.compile_blocks = quickly  # type: ignore[attr-defined]


def graphs(cases: list[Case]) -> list[int]:
    """How many graphs a step of each case is compiled to."""
    device = start_distributed("cpu")
    _compile_quickly()
    counts = []
    for case in cases:
        branches.PIECE_TOKENS = case.piece_tokens
        torch.compiler.reset()
        model = parallel_model(case, build_mesh(case.parallel, device))
        loss_of(model, case, inputs_of(case, range(1))).backward()
        counts.append(torch._dynamo.utils.counters["stats"].pop("unique_graphs", 0))
    return counts


def runs(cases: list[Case], steps: int) -> list[tuple[list[float], list[float]]]:
    """Losses and gradient norms of a run of each case."""
    device = start_distributed("cpu")
    return [_run(case, build_mesh(case.parallel, device), steps) for case in cases]


def _run(case: Case, mesh: Mesh, steps: int) -> tuple[list[float], list[float]]:
    model = parallel_model(case, mesh)
    trainee = Trainee(
        model=model,
        objective=objective_of(case),
        optimizer=build_optimizer(model, OptimizerConfig(lr=3e-3)),
        ema=Ema(model, EmaConfig()),
    )
    losses, norms = [], []
    for step in range(steps):
        result = training_step(
            trainee,
            [inputs_of(case, _own_samples(mesh), step)],
            num_micro_batches=1,
            condition_dropout=0.4,
            clip_norm=1.0,
            lr=3e-3,
            step=step,
        )
        losses.append(float(mean_over_processes(result.loss)))
        norms.append(float(result.gradient_norm))
    return losses, norms


class CountExchanged(TorchDispatchMode):
    """Counts the bytes that this process puts into all-to-alls and sends around rings, within the
    context."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.ring_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self.bytes += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self._batch_isend_irecv = dist.batch_isend_irecv
        dist.batch_isend_irecv = self._counted
        return super().__enter__()

    def __exit__(self, *exception):
        dist.batch_isend_irecv = self._batch_isend_irecv
        super().__exit__(*exception)

    def _counted(self, moves):
        sent = [move.tensor for move in moves if move.op is dist.isend]
        self.ring_bytes += sum(x.numel() * x.element_size() for x in sent)
        return self._batch_isend_irecv(moves)


class Sequence(TorchDispatchMode):
    """Notes in which order all-to-alls are begun (s), waited for (w), and products computed (m)."""

    def __init__(self) -> None:
        super().__init__()
        self.events = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        collectives, aten = torch.ops._c10d_functional, torch.ops.aten
        if func is collectives.all_to_all_single.default:
            self.events += "s"
        elif func is collectives.wait_tensor.default:
            self.events += "w"
        elif func in (aten.mm.default, aten.addmm.default) and not self.events.endswith("m"):
            self.events += "m"
        return func(*args, **(kwargs or {}))


def orders_of_events(cases: list[Case]) -> list[tuple[str, str]]:
    """Of the first temporal branch, forward and backward."""
    return [_order_of_events(case) for case in cases]


def _order_of_events(case: Case) -> tuple[str, str]:
    mesh = build_mesh(case.parallel, start_distributed("cpu"))
    model = build(case)
    init_weights(model, seed=0, write=write_shaken)
    assert mesh.token_group is not None
    split_sequence(model, mesh.token_group, in_halves=case.parallel.exchange_in_halves)
    branch = next(module for name, module in model.named_modules() if name.endswith("attn_temp"))
    shapes = []
    branch.register_forward_pre_hook(lambda _, args: shapes.extend(x.shape for x in args))
    loss_of(model, case, inputs_of(case, range(1)))
    stream, *rows = (torch.randn(shape, requires_grad=True) for shape in shapes[:4])
    with Sequence() as forward:
        out = branch(stream, *rows)
    with Sequence() as backward:
        out.sum().backward()
    return forward.events, backward.events


def exchanged(cases: list[Case]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Bytes of one sample, forward and backward: in all-to-alls, and around rings."""
    device = start_distributed("cpu")
    results = []
    for case in cases:
        model = parallel_model(case, build_mesh(case.parallel, device))
        with CountExchanged() as forward:
            loss = loss_of(model, case, inputs_of(case, range(1)))
        with CountExchanged() as backward:
            loss.backward()
        in_all_to_alls = forward.bytes, backward.bytes
        results.append((in_all_to_alls, (forward.ring_bytes, backward.ring_bytes)))
    return results


def _own_samples(mesh: Mesh) -> range:
    count = BATCH // mesh.dp_size
    return range(mesh.dp_rank * count, (mesh.dp_rank + 1) * count)


def parallel_model(case: Case, mesh: Mesh):
    with torch.device("meta"):
        model = build(case)
    parallelize(model, mesh, case.parallel)
    materialize(model, mesh.device)
    init_weights(model, seed=0, write=write_shaken)
    return model


def errors_of(found, case: Case, dtype=torch.float32) -> dict[str, float]:
    """By name, how far loss and gradients are from plain PyTorch's, relative to their norms."""
    sizes = {"num_heads": case.num_heads, "depth": case.depth}
    plain = Case(case.model, case.objective, case.latents, **sizes)
    loss, gradients = alone(plain, dtype)
    assert found[1].keys() == gradients.keys()
    errors = {"loss": abs(found[0] - loss) / abs(loss)}
    for name, gradient in gradients.items():
        errors[name] = float((found[1][name] - gradient).norm() / gradient.norm())
    return errors


def assert_same(found, case: Case, *, tolerance: float, dtype=torch.float32) -> None:
    """Loss and every gradient are those of plain PyTorch."""
    for name, error in errors_of(found, case, dtype).items():
        assert error <= tolerance, f"{case.model}, {name}: relative error {error:.2g}"
