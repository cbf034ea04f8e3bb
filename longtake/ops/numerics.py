"""Every implementation of every operation against plain torch, on the device it will run on.

Kernels have been wrong on one kind of GPU, at one head size, in one gradient, without a word. So
each is measured here, forward and backward: its largest error against float64 may be twice that of
plain torch in the same dtype. `longtake doctor --numerics` checks all of them, and training checks
those it is about to use. `longtake.ops.numerics_apart` spreads checks over processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longtake.ops import kernels
from longtake.ops.numerics_operations import OPERATIONS, Operation, Outputs, Shape

# Beside twice the error of plain torch, which may be none at all: what is left where float32 sums
# cancel. Relative to values above 1.
SLACK = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 1e-5}
# More keys than this are checked as fewer, with the same remainder in a kernel's last tile.
MAX_KEYS = {"cuda": 4096, "cpu": 256}
LARGEST_TILE = 256


@dataclass(frozen=True, kw_only=True)
class Check:
    """One implementation at one shape and dtype."""

    operation: str
    implementation: kernels.AttentionBackend
    dtype: torch.dtype
    shape: Shape  # sizes by their letters

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def shape_name(self) -> str:
        return " ".join(f"{letter}={size}" for letter, size in self.shape.items())


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a check: its worst tensor, or the error that it raised."""

    check: Check
    passed: bool
    error: float  # the largest against float64
    allowed: float
    detail: str  # the tensor's name, or what was raised
    seconds: float

    @property
    def reason(self) -> str:
        """Why it failed, in a sentence."""
        check = self.check
        where = f"{check.operation} by {check.implementation} in {check.dtype_name}"
        if self.error == self.error and self.allowed:
            failure = f"{self.detail} is wrong by {self.error:.2g}, {self.allowed:.2g} allowed"
        else:
            failure = self.detail
        return f"{where} at {check.shape_name}: {failure}"


@dataclass(frozen=True, kw_only=True)
class AttentionUse:
    """One kind of attention as a model uses it."""

    kind: kernels.Kind
    keys: int  # for temporal attention: frames
    head_size: int
    num_heads: int
    in_parts: bool = False
    """Whether keys come in parts, around a ring of processes."""


def checks(device: torch.device) -> list[Check]:
    """All that can run on this device. Under Triton's interpreter shapes are small."""
    return [
        Check(operation=name, implementation=implementation, dtype=dtype, shape=shape)
        for name, operation in OPERATIONS.items()
        for implementation in operation.implementations
        for dtype, shape in operation.cases(device, implementation)
        if operation.problem(implementation, device, dtype, shape) is None
    ]


def absent(device: torch.device) -> dict[str, str]:
    """Why, by name, for each implementation that cannot run any of its checks on this device."""
    problems: dict[str, str] = {}
    able = {check.implementation for check in checks(device)}
    for operation in OPERATIONS.values():
        for name in set(operation.implementations) - able:
            for dtype, shape in operation.cases(device, name):
                problems.setdefault(name, operation.problem(name, device, dtype, shape) or "")
    return problems


def run_checks(device: torch.device, *, only: Collection[str] | None = None) -> Iterator[Result]:
    """Runs `checks` one after the other, those of the operations named in `only` if it is given."""
    for check in checks(device):
        if only is None or check.operation in only:
            yield run_check(check, device)


def verify_chosen(
    device: torch.device,
    dtype: torch.dtype,
    *,
    attentions: Iterable[AttentionUse],
    hidden_size: int | None = None,
) -> list[Result]:
    """Checks what training is about to use, in a few seconds; the first checks also compile.

    Each choice of "auto" that fails is ruled out for this process, and the next is checked in its
    stead. What the configuration insists on stays, whatever comes out. With a hidden size,
    element-wise operations are checked too. The caller warns of results that did not pass.
    """
    results = []
    for use in attentions:
        results += _verify_attention(device, dtype, use)
    if hidden_size is not None:
        results += _verify_elementwise(device, dtype, hidden_size)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # float64 scores are large, and nobody else wants their blocks
    return results


def _verify_attention(
    device: torch.device, dtype: torch.dtype, use: AttentionUse
) -> Iterator[Result]:
    operation_name = "partial_attention" if use.in_parts else use.kind
    operation = OPERATIONS[operation_name]
    while True:
        name = kernels.attention_backend(
            use.kind,
            keys=use.keys,
            head_size=use.head_size,
            dtype=dtype,
            device=device,
            in_parts=use.in_parts,
        )
        if name == "reference":
            return
        keys, most = use.keys, MAX_KEYS[device.type]
        if keys > most:
            keys = most - -keys % LARGEST_TILE
        shape = operation.shape_for(keys, use.head_size, use.num_heads)
        check = Check(operation=operation_name, implementation=name, dtype=dtype, shape=shape)
        result = run_check(check, device)
        yield result
        if result.passed or getattr(kernels.current_kernels(), use.kind) != "auto":
            return
        kernels.rule_out(use.kind, name, result.reason)


def _verify_elementwise(
    device: torch.device, dtype: torch.dtype, hidden_size: int
) -> Iterator[Result]:
    name = kernels.elementwise(torch.empty(0, device=device))
    if name == "reference":
        return
    for operation_name, operation in OPERATIONS.items():
        if operation.setting != "elementwise":
            continue
        shape = operation.shape_for(hidden_size)
        check = Check(operation=operation_name, implementation=name, dtype=dtype, shape=shape)
        result = run_check(check, device)
        yield result
        if not result.passed and kernels.current_kernels().elementwise == "auto":
            kernels.rule_out("elementwise", name, result.reason)


def run_check(check: Check, device: torch.device) -> Result:
    """Compares output and gradients. What raises is a failure with its message.

    Raises: RuntimeError if it left a device on which nothing runs any more.
    """
    start = time.perf_counter()
    try:
        error, allowed, detail = _worst(check, device)
    except Exception as raised:  # A kernel may fail in any way: that is what is asked here.
        lines = str(raised).strip().splitlines()
        detail = f"{type(raised).__name__}: {lines[0] if lines else 'no message'}"
        error, allowed = float("nan"), 0.0
        if not _still_runs(device):
            # Everything after it would fail, too, and be blamed for it.
            raise RuntimeError(
                f"{check.operation} by {check.implementation} in {check.dtype_name} at "
                f"{check.shape_name} broke the device for this process ({detail}): choose another "
                f"with --kernels.{OPERATIONS[check.operation].setting.replace('_', '-')}"
            ) from raised
    return Result(
        check=check,
        passed=error <= allowed,  # and not if it is NaN
        error=error,
        allowed=allowed,
        detail=detail,
        seconds=time.perf_counter() - start,
    )


def _still_runs(device: torch.device) -> bool:
    """Whether the device computes; after an illegal access it does not, until the process ends."""
    try:
        return bool(torch.ones((), device=device) == 1)
    except RuntimeError:
        return False


def _worst(check: Check, device: torch.device) -> tuple[float, float, str]:
    """(error, allowed, name) of the output or gradient that is worst beside what is allowed."""
    operation = OPERATIONS[check.operation]
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, x in operation.draw(check.shape, generator).items():
        is_single = name in operation.float32_inputs
        dtype = torch.float32 if is_single else check.dtype
        inputs[name] = x.to(device, dtype if x.is_floating_point() else None)
    setting = replace(kernels.current_kernels(), **{operation.setting: check.implementation})
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}

    exact = _outputs_and_gradients(operation, operation.reference, doubles, check.dtype)
    plain = _outputs_and_gradients(operation, operation.plain, inputs, check.dtype)
    with kernels.kernels_as(setting):
        found = _outputs_and_gradients(operation, operation.run, inputs, check.dtype)

    worst = (0.0, 1.0, "")
    for name, right in exact.items():
        assert found[name].shape == right.shape, (
            f"{name} has shape {tuple(found[name].shape)}, not {tuple(right.shape)}"
        )
        error = _distance(found[name], right)
        if error != error or error == float("inf"):
            return float("nan"), 0.0, f"{name} is not finite"
        size = float(right.abs().max())
        allowed = 2 * _distance(plain[name], right) + SLACK[found[name].dtype] * max(1.0, size)
        if not worst[2] or error * worst[1] > worst[0] * allowed:
            worst = (error, allowed, name)
    return worst


def _distance(x: Tensor, right: Tensor) -> float:
    return float((x.double() - right).abs().max())


def _outputs_and_gradients(
    operation: Operation,
    function: Callable[..., Outputs],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Outputs by name, and the gradient of each input x as dx, where there is one."""
    inputs = {
        name: x.detach().requires_grad_(x.is_floating_point() and operation.is_differentiable)
        for name, x in inputs.items()
    }
    with torch.enable_grad():
        outputs = function(*inputs.values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = {name: x.detach() for name, x in zip(operation.outputs, outputs, strict=True)}
        if not operation.is_differentiable:
            return found
        generator = torch.Generator().manual_seed(1)
        weights = [
            # Rounded first, so that all see the same gradient.
            torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype).to(x)
            for x in outputs
        ]
        sought = {name: x for name, x in inputs.items() if x.requires_grad}
        gradients = torch.autograd.grad(outputs, list(sought.values()), weights)
    named = zip(sought, gradients, strict=True)
    return found | {f"d{name}": gradient for name, gradient in named}
