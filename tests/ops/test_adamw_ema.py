"""adamw_ema and squared_norm against float64, and against torch's own fused AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.ops import adamw_ema as module
from longtake.ops.adamw_ema import (
    adamw_ema,
    adamw_ema_reference,
    squared_norm,
    squared_norm_reference,
)
from longtake.ops.tensor_table import CHUNK, TensorTable

# The interpreter's numpy warns of infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One element, odd ones, nothing at all (a process may hold none of a short tensor), many.
SIZES = (1, 7, 0, 1000, 2048)


class Weights:
    """Tensors to update. With an offset of one element none lies where 16 bytes begin."""

    def __init__(
        self, sizes: tuple[int, ...], *, dtype: torch.dtype = torch.float32, offset: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            tensors = []
            for size in sizes:
                memory = torch.empty(size + offset, dtype=dtype, device=DEVICE)[offset:]
                tensors.append(memory.copy_(torch.randn(size, generator=generator) * scale))
            return tensors

        self.params, self.exp_avgs, self.exp_avg_sqs = draw(1), draw(0), draw(0)
        self.averages = draw(0.5)
        self.steps = [torch.zeros((), device=DEVICE) for _ in sizes]

    @property
    def lists(self) -> dict[str, list[Tensor]]:
        return {
            "params": self.params,
            "exp_avgs": self.exp_avgs,
            "exp_avg_sqs": self.exp_avg_sqs,
            "averages": self.averages,
            "steps": self.steps,
        }

    def update(self, gradients: list[Tensor], *, op=adamw_ema, **options) -> None:
        op(
            self.params,
            gradients,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.averages,
            self.steps,
            **(OPTIONS | options),
        )


OPTIONS = {
    "clip_factor": torch.tensor(0.7, device=DEVICE),
    "applied": torch.ones((), device=DEVICE),
    "lr": 1e-2,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "ema_rate": 0.1,
}


def gradients_of(step: int, sizes=SIZES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    # Sizes that differ by tensor, as those of a network do.
    return [
        (torch.randn(size, generator=generator) * 10.0 ** -(i % 4)).to(DEVICE, dtype)
        for i, size in enumerate(sizes)
    ]


def updated_by_torch(sizes, all_gradients, rates, weight_decay) -> Weights:
    """The same updates by torch's clipping, its fused AdamW and its lerp."""
    weights = Weights(sizes)
    optimizer = torch.optim.AdamW(
        weights.params, betas=OPTIONS["betas"], weight_decay=weight_decay, fused=True
    )
    for gradients, (lr, ema_rate) in zip(all_gradients, rates, strict=True):
        for param, gradient in zip(weights.params, gradients, strict=True):
            param.grad = gradient.float() * OPTIONS["clip_factor"]
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        torch._foreach_lerp_(weights.averages, weights.params, ema_rate)
    for i, param in enumerate(weights.params):
        weights.exp_avgs[i] = optimizer.state[param]["exp_avg"]
        weights.exp_avg_sqs[i] = optimizer.state[param]["exp_avg_sq"]
        weights.steps[i] = optimizer.state[param]["step"]
    return weights


def assert_as_good(found: Weights, by_torch: Weights, exact: Weights) -> None:
    for name, tensors in found.lists.items():
        for i, tensor in enumerate(tensors):
            other, truth = by_torch.lists[name][i], exact.lists[name][i]
            if tensor.numel():
                error = (tensor.double() - truth).abs().max()
                # Of four units in the last place, or twice what torch errs.
                allowed = 2 * (other.double() - truth).abs().max() + 5e-7 * truth.abs().max()
                assert error <= allowed, f"{name}[{i}]: {error} > {allowed}"
                torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_updates_are_those_of_torch(weight_decay: float, offset: int, dtype: torch.dtype):
    found, exact = Weights(SIZES, offset=offset), Weights(SIZES, dtype=torch.float64)
    table = TensorTable()
    # A learning rate and an average that warm up: none of the numbers stays.
    rates = [(1e-2 * (step + 1) / 20, 1 - (1 + step) / (10 + step)) for step in range(20)]
    all_gradients = [gradients_of(step, dtype=dtype) for step in range(20)]
    for gradients, (lr, ema_rate) in zip(all_gradients, rates, strict=True):
        options = {"lr": lr, "ema_rate": ema_rate, "weight_decay": weight_decay}
        found.update(gradients, table=table, **options)
        exact.update(gradients, op=adamw_ema_reference, **options)
    assert [float(step) for step in found.steps] == [20.0] * len(SIZES)
    assert_as_good(found, updated_by_torch(SIZES, all_gradients, rates, weight_decay), exact)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (CHUNK - 1, torch.float32),
        (CHUNK, torch.bfloat16),
        (2 * CHUNK + 1, torch.bfloat16),
        (65537, torch.float32),
    ],
)
def test_tensors_of_several_chunks(size: int, dtype: torch.dtype):
    sizes = (3, size, 5)
    found, exact = Weights(sizes), Weights(sizes, dtype=torch.float64)
    all_gradients = [gradients_of(step, sizes, dtype) for step in range(3)]
    for gradients in all_gradients:
        found.update(gradients)
        exact.update(gradients, op=adamw_ema_reference)
    rates = [(OPTIONS["lr"], OPTIONS["ema_rate"])] * 3
    by_torch = updated_by_torch(sizes, all_gradients, rates, OPTIONS["weight_decay"])
    assert_as_good(found, by_torch, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_copies_become_the_parameters_rounded(offset: int, dtype: torch.dtype):
    sizes = (*SIZES, CHUNK + 8)
    weights, without = Weights(sizes), Weights(sizes)
    copies = Weights(sizes, dtype=dtype, offset=offset).averages  # anything but the parameters
    for step in range(2):
        gradients = gradients_of(step, sizes)
        weights.update(gradients, copies=copies)
        without.update(gradients)
        for copy, param, other in zip(copies, weights.params, without.params, strict=True):
            assert torch.equal(param, other)
            assert torch.equal(copy, param.to(dtype))
    before = [copy.clone() for copy in copies]
    weights.update(gradients_of(2, sizes), copies=copies, applied=torch.zeros((), device=DEVICE))
    assert all(map(torch.equal, copies, before))
    exact = Weights(sizes)
    exact.update(gradients_of(0, sizes), copies=copies, op=adamw_ema_reference)
    assert all(torch.equal(c, p.to(dtype)) for c, p in zip(copies, exact.params, strict=True))


@pytest.mark.parametrize("applied_before", [False, True], ids=["first", "second"])
def test_a_skipped_update_keeps_every_bit(applied_before: bool):
    weights, table = Weights(SIZES), TensorTable()
    if applied_before:
        weights.update(gradients_of(0), table=table)
    before = {name: [t.clone() for t in tensors] for name, tensors in weights.lists.items()}
    gradients = gradients_of(1)
    gradients[3][5] = float("nan")
    nan = torch.tensor(float("nan"), device=DEVICE)
    weights.update(gradients, table=table, clip_factor=nan, applied=torch.zeros((), device=DEVICE))
    for name, tensors in weights.lists.items():
        for tensor, old in zip(tensors, before[name], strict=True):
            assert torch.equal(tensor, old), name
    # And the next one goes on as if the skipped one had not been.
    expected = Weights(SIZES)
    if applied_before:
        expected.update(gradients_of(0))
    for either in (weights, expected):
        either.update(gradients_of(2))
    for name, tensors in weights.lists.items():
        for tensor, other in zip(tensors, expected.lists[name], strict=True):
            assert torch.equal(tensor, other), name


def test_first_update_of_a_slow_beta_keeps_its_digits():
    """1 - 0.9999 ** 1 computed in float32 would be off by 1e-4 of itself."""
    found, exact = Weights((64,)), Weights((64,), dtype=torch.float64)
    options = {"betas": (0.99, 0.9999), "weight_decay": 0.0, "lr": 1.0}
    found.update(gradients_of(0, (64,)), **options)
    exact.update(gradients_of(0, (64,)), op=adamw_ema_reference, **options)
    torch.testing.assert_close(found.params[0].double(), exact.params[0], rtol=0, atol=1e-6)


def test_betas_of_zero_are_plain_signs():
    found, exact = Weights((64,)), Weights((64,), dtype=torch.float64)
    for op, weights in ((adamw_ema, found), (adamw_ema_reference, exact)):
        weights.update(gradients_of(0, (64,)), op=op, betas=(0, 0.0))
    torch.testing.assert_close(found.params[0].double(), exact.params[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_squared_norm_is_the_sum_of_squares(offset: int, dtype: torch.dtype):
    tensors = gradients_of(0, (*SIZES, CHUNK + 3), dtype)
    moved = [torch.empty(t.numel() + offset, dtype=dtype, device=DEVICE)[offset:] for t in tensors]
    for memory, tensor in zip(moved, tensors, strict=True):
        memory.copy_(tensor)
    found = squared_norm(moved)
    exact = sum(tensor.double().square().sum() for tensor in tensors)
    assert found.shape == ()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(squared_norm_reference(moved), found, rtol=1e-6, atol=0)
    assert torch.equal(squared_norm(moved), found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize("where", [(0, 0), (3, 999), (5, CHUNK + 2)], ids=["first", "mid", "last"])
def test_squared_norm_is_not_finite_if_an_element_is_not(where: tuple[int, int], bad: float):
    tensors = gradients_of(0, (*SIZES, CHUNK + 3))
    assert squared_norm(tensors).isfinite()
    tensors[where[0]][where[1]] = bad
    assert not squared_norm(tensors).isfinite()


def test_squared_norm_of_nothing_is_zero():
    assert squared_norm([torch.empty(0, 8, device=DEVICE)] * 3) == 0


def test_a_table_follows_tensors_that_move():
    weights, expected, table = Weights((5, 9)), Weights((5, 9)), TensorTable()
    left_behind = []
    for step in range(3):
        for either, its_table in ((weights, table), (expected, None)):
            either.update(gradients_of(step, (5, 9)), table=its_table)
        old = weights.params[1]
        weights.params[1] = old.clone()
        left_behind.append((old, old.clone()))
    assert torch.equal(weights.params[1], expected.params[1])
    # The old memory is still there: an update by a stale address would show in it.
    assert all(torch.equal(old, copy) for old, copy in left_behind)


def test_a_table_is_copied_only_when_something_moved():
    tensors = gradients_of(0)
    table = TensorTable()
    table.write(tensors)
    addresses, chunks = table.addresses_RP, table.chunks_2C
    table.write(tensors)
    assert table.addresses_RP is addresses
    table.write([tensor.clone() for tensor in tensors])
    assert table.addresses_RP is not addresses
    assert table.chunks_2C is chunks, "the sizes are the same"
    table.write([tensors[3]])
    assert table.num_chunks == 1


def test_chunks_cover_every_element_once():
    sizes = [1, 0, CHUNK, CHUNK + 1, 5 * CHUNK - 1, 0]
    table = TensorTable()
    table.write([torch.empty(size) for size in sizes])
    covered = [0] * len(sizes)
    for tensor, place in table.chunks_2C.T.tolist():
        assert place * CHUNK == covered[tensor], "chunks of a tensor come in order"
        covered[tensor] += min(CHUNK, sizes[tensor] - place * CHUNK)
    assert covered == sizes


@pytest.mark.parametrize("wrong", ["dtype", "strides", "shape", "device"])
def test_what_the_kernel_cannot_read_is_refused(wrong: str):
    weights = Weights((6, 6))
    bad = {
        "dtype": torch.zeros(6, dtype=torch.bfloat16, device=DEVICE),
        "strides": torch.zeros(12, device=DEVICE)[::2],
        "shape": torch.zeros(7, device=DEVICE),
        "device": torch.zeros(6, device="meta"),
    }[wrong]
    weights.exp_avgs[1] = bad
    with pytest.raises(AssertionError, match=None if wrong != "device" else "a tensor on meta"):
        weights.update(gradients_of(0, (6, 6)))


class _Recorder:
    """Stands in a kernel's place and keeps what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple, dict]] = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def test_rates_that_change_compile_nothing_anew(monkeypatch: pytest.MonkeyPatch):
    """Triton compiles a kernel once for each combination of types and constants: integers of 1 are
    constants, floats never are."""
    recorder = _Recorder()
    recorder.fn = module.kernels.adamw_ema_kernel.fn
    monkeypatch.setattr(module.kernels, "adamw_ema_kernel", recorder)
    weights, table = Weights((6, 6)), TensorTable()
    for lr, ema_rate in ((1e-4, 0.9), (0, 1), (1, 0), (16, 1e-4)):
        weights.update(gradients_of(0, (6, 6)), table=table, lr=lr, ema_rate=ema_rate)
    assert len(recorder.launches) == 4
    kinds = {
        (tuple(type(arg) for arg in args), tuple(kwargs.items()))
        for args, kwargs in recorder.launches
    }
    assert len(kinds) == 1
    args = recorder.launches[0][0]
    assert [type(arg) for arg in args[7:]] == [float] * 6
