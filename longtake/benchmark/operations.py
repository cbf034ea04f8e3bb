"""The operations that are timed alone, at the shapes of production: 65,536 tokens of an XL model.

Letters: B batch, N tokens, T frames, S patches per frame, L text tokens, D hidden size, A heads,
E size per head, F inner size of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.ops import kernels
from longtake.ops.kernels import KernelConfig, Kind
from longtake.parallel.compile import COMPILER_OPTIONS

_BYTES = 2  # bf16, as the figures of merit count it


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What the operations are timed on."""

    tokens: int = 65_536
    heads: int = 16
    head_size: int = 72
    keys: tuple[int, ...] = (256, 1024, 8160, 65_536)
    frames: tuple[int, ...] = (16, 64)
    samples: int = 16
    text_tokens: int = 120
    parameters: int = 1 << 28
    """Of the optimizer's update."""

    @property
    def hidden_size(self) -> int:
        return self.heads * self.head_size


TINY = Shapes(
    tokens=64,
    heads=2,
    head_size=16,
    keys=(16, 64),
    frames=(4,),
    samples=2,
    text_tokens=8,
    parameters=1 << 12,
)

Draw = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A call with its inputs in memory."""

    forward: Callable[[], Any]
    """In the end a tensor, or a tuple whose last is it."""
    inputs: tuple[Tensor, ...] = ()
    """What gradients are asked for; nothing: there is no backward."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation at one shape."""

    key: str
    implementations: tuple[str, ...]
    prepare: Callable[[Draw, str], Prepared]
    """From a source of random tensors and the name of an implementation."""
    setting: str | None = None
    """The field of `KernelConfig` that picks the implementation."""
    flops: tuple[float, float] = (0.0, 0.0)
    """Useful ones, forward and backward."""
    moved: tuple[float, float] = (0.0, 0.0)
    """Bytes that must be read and written at least, forward and backward."""
    scores: float = 0.0
    """Scores of an explicit softmax, which plain torch keeps in memory."""
    attention: tuple[Kind, int] | None = None
    """Its kind and number of keys, where there is a choice by them."""

    def config(self, implementation: str) -> KernelConfig:
        """The choices under which it runs."""
        name: Any = "reference" if implementation == "compiled" else implementation
        return replace(KernelConfig(), **{self.setting: name}) if self.setting else KernelConfig()

    def automatic(self, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> str | None:
        """The implementation that training takes of its own accord."""
        if self.attention is not None:
            kind, keys = self.attention
            return kernels.attention_backend(
                kind, keys=keys, head_size=shapes.head_size, dtype=dtype, device=device
            )
        if self.setting == "elementwise":
            return kernels.elementwise(torch.empty(0, dtype=dtype, device=device))
        return None


def operations(shapes: Shapes) -> Iterator[Operation]:
    """All of them, from the cheapest kind to the dearest."""
    yield from _elementwise(shapes)
    yield from _branches(shapes)
    yield from _linears(shapes)
    yield from _updates(shapes)
    yield from _attentions(shapes)


_FUSED = ("reference", "compiled", "triton")


def _maybe_compiled(function: Callable[..., Any], implementation: str) -> Callable[..., Any]:
    if implementation != "compiled":
        return function
    return torch.compile(function, fullgraph=True, dynamic=False, options=COMPILER_OPTIONS)


def _fused(
    key: str,
    load: Callable[[], Callable[..., Any]],
    draw_inputs: Callable[[Draw], tuple[Tensor, ...]],
    *,
    passes: tuple[float, float],
    values: float,
    flops: tuple[float, float] = (0.0, 0.0),
    differentiable: bool = True,
) -> Operation:
    """An operation that `KernelConfig.elementwise` picks; it makes so many passes over values."""

    def prepare(draw: Draw, implementation: str) -> Prepared:
        inputs = draw_inputs(draw)
        function = _maybe_compiled(load(), implementation)
        for tensor in inputs:
            tensor.requires_grad_(differentiable)
        return Prepared(forward=lambda: function(*inputs), inputs=inputs if differentiable else ())

    forward, backward = passes
    return Operation(
        key=key,
        implementations=_FUSED,
        setting="elementwise",
        prepare=prepare,
        flops=flops,
        moved=(forward * values * _BYTES, backward * values * _BYTES),
    )


def _elementwise(shapes: Shapes) -> Iterator[Operation]:
    B, D = shapes.samples, shapes.hidden_size
    N = shapes.tokens // B
    tokens = float(shapes.tokens * D)

    def norm_modulate() -> Callable[..., Any]:
        from longtake.ops.norm_modulate import norm_modulate

        return norm_modulate

    def gated_residual() -> Callable[..., Any]:
        from longtake.ops.gated_residual import gated_residual

        return gated_residual

    def gelu() -> Callable[..., Any]:
        from longtake.ops.gelu import gelu

        return gelu

    def qk_norm_rotary() -> Callable[..., Any]:
        from longtake.ops.qk_norm_rotary import qk_norm_rotary

        return qk_norm_rotary

    def column_sum() -> Callable[..., Any]:
        from longtake.ops.column_sum import column_sum

        return column_sum

    yield _fused(
        "norm_modulate",
        norm_modulate,
        lambda draw: (draw(B, N, D), draw(B, 1, D), draw(B, 1, D)),
        passes=(2, 3),
        values=tokens,
    )
    yield _fused(
        "gated_residual",
        gated_residual,
        lambda draw: (draw(B, N, D), draw(B, 1, D), draw(B, N, D)),
        passes=(3, 3),
        values=tokens,
    )
    yield _fused(
        "gelu",
        gelu,
        lambda draw: (draw(shapes.tokens, 4 * D),),
        passes=(2, 3),
        values=4 * tokens,
    )
    yield _fused(
        "qk_norm_rotary",
        qk_norm_rotary,
        lambda draw: (
            draw(B, N, 3, shapes.heads, shapes.head_size),
            draw(shapes.head_size),
            draw(shapes.head_size),
        ),
        passes=(6, 8),
        values=tokens,
    )
    yield _fused(
        "column_sum",
        column_sum,
        lambda draw: (draw(shapes.tokens, 4 * D),),
        passes=(1, 0),
        values=4 * tokens,
        differentiable=False,
    )


def _branches(shapes: Shapes) -> Iterator[Operation]:
    """A linear layer with what stands beside it."""
    B, D = shapes.samples, shapes.hidden_size
    N, inner = shapes.tokens // B, 4 * D
    tokens = float(shapes.tokens * D)

    def modulated_linear() -> Callable[..., Any]:
        from longtake.ops.modulated_linear import modulated_linear

        return modulated_linear

    def gated_linear() -> Callable[..., Any]:
        from longtake.ops.gated_linear import gated_linear

        return gated_linear

    def gated_mlp() -> Callable[..., Any]:
        from longtake.ops.gated_mlp import gated_mlp

        return gated_mlp

    def weight(draw: Draw, rows: int, columns: int) -> Tensor:
        return draw(rows, columns) * columns**-0.5

    def product(rows: int, columns: int) -> tuple[float, float]:
        flops = 2.0 * shapes.tokens * rows * columns
        return flops, 2 * flops

    yield _fused(
        "modulated_linear, q k v",
        modulated_linear,
        lambda draw: (
            *(draw(B, N, D), draw(B, 1, D), draw(B, 1, D)),
            *(weight(draw, 3 * D, D), draw(3 * D)),
        ),
        passes=(4, 8),
        values=tokens,
        flops=product(D, 3 * D),
    )
    yield _fused(
        "gated_linear, output",
        gated_linear,
        lambda draw: (
            *(draw(B, N, D), draw(B, 1, D), draw(B, N, D)),
            *(weight(draw, D, D), draw(D)),
        ),
        passes=(3, 4),
        values=tokens,
        flops=product(D, D),
    )
    forward, backward = product(D, 2 * inner)
    yield _fused(
        "gated_mlp",
        gated_mlp,
        lambda draw: (
            *(draw(B, N, D), draw(B, 1, D), draw(B, 1, D), draw(B, 1, D)),
            *(weight(draw, inner, D), draw(inner)),
            *(weight(draw, D, inner), draw(D)),
        ),
        passes=(10, 20),
        values=tokens,
        flops=(forward, backward),
    )


def _linears(shapes: Shapes) -> Iterator[Operation]:
    """The three products of a linear layer, at the four shapes of a block; in fp8 with its operands
    cast and laid out beforehand, which is what a step in fp8 could gain at best."""
    D, M = shapes.hidden_size, shapes.tokens

    def in_fp8(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
        a8 = a.to(torch.float8_e4m3fn).contiguous()
        b8 = b.t().to(torch.float8_e4m3fn).contiguous().t()  # the only order that Hopper takes
        one = torch.ones((), device=a.device)
        return lambda: torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def product(kind: str, rows: int, columns: int) -> Operation:
        def prepare(draw: Draw, implementation: str) -> Prepared:
            x, weight, dy = draw(M, columns), draw(rows, columns), draw(M, rows)
            if implementation == "fp8":
                operands = {"forward": (x, weight.t()), "dgrad": (dy, weight), "wgrad": (dy.t(), x)}
                return Prepared(forward=in_fp8(*operands[kind]))
            if implementation == "transposed":
                return Prepared(forward=lambda: (x.t() @ dy).t())
            calls: dict[str, Callable[[], Tensor]] = {
                "forward": lambda: F.linear(x, weight),
                "dgrad": lambda: dy @ weight,
                "wgrad": lambda: dy.t() @ x,
            }
            return Prepared(forward=calls[kind])

        return Operation(
            key=f"linear {columns} to {rows}, {kind}",
            # What `weight_gradient` chooses from.
            implementations=("torch", *(["transposed"] if kind == "wgrad" else []), "fp8"),
            prepare=prepare,
            flops=(2.0 * M * rows * columns, 0.0),
            moved=(_BYTES * float(M * (rows + columns) + rows * columns), 0.0),
        )

    for rows, columns in ((3 * D, D), (D, D), (4 * D, D), (D, 4 * D)):
        for kind in ("forward", "dgrad", "wgrad"):
            yield product(kind, rows, columns)


def _updates(shapes: Shapes) -> Iterator[Operation]:
    """The optimizer's pass over weights, moments and averages, fp32."""

    def prepare(draw: Draw, implementation: str) -> Prepared:
        from longtake.ops import adamw_ema

        count = 16
        names = ("params", "gradients", "exp_avgs", "exp_avg_sqs", "averages")
        lists: dict[str, list[Tensor]] = {
            name: [draw(shapes.parameters // count, dtype=torch.float32) for _ in range(count)]
            for name in names
        }
        for squares in lists["exp_avg_sqs"]:
            squares.square_()
        one = torch.ones((), device=lists["params"][0].device)
        steps = [4 * one for _ in range(count)]
        functions = {
            "triton": adamw_ema.adamw_ema,
            "reference": adamw_ema.adamw_ema_reference,
        }
        # The moments stay what they are with betas this close to 1, however often this is called.
        numbers = {"lr": 1e-6, "betas": (0.9999, 0.9999), "eps": 1e-8, "weight_decay": 0.0}
        return Prepared(
            forward=lambda: functions[implementation](
                *lists.values(), steps, clip_factor=one, applied=one, ema_rate=1e-4, **numbers
            )
        )

    def prepare_torch(draw: Draw, implementation: str) -> Prepared:
        """What PyTorch brings for the same: clip, fused AdamW, then the averages."""
        count = 16
        params = [draw(shapes.parameters // count, dtype=torch.float32) for _ in range(count)]
        averages = [param.clone() for param in params]
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer = torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, fused=True)
        gradients = [param.grad for param in params if param.grad is not None]
        one = torch.ones((), device=params[0].device)

        def update() -> None:
            torch._foreach_mul_(gradients, one)  # pyright: ignore[reportPrivateImportUsage]
            optimizer.step()
            torch._foreach_lerp_(averages, params, 1e-4)  # pyright: ignore[reportPrivateImportUsage]

        return Prepared(forward=update)

    yield Operation(
        key="AdamW and EMA",
        implementations=("torch", "reference", "triton"),
        prepare=lambda draw, name: (prepare_torch if name == "torch" else prepare)(draw, name),
        moved=(36.0 * shapes.parameters, 0.0),
    )


def _attention(
    shapes: Shapes,
    kind: Kind,
    key: str,
    implementations: tuple[str, ...],
    prepare: Callable[[Draw, str], Prepared],
    *,
    pairs: float,
    keys: int,
    moved: tuple[float, float],
) -> Operation:
    """`pairs` of a query and a key, of all heads together."""
    flops = 4.0 * pairs * shapes.hidden_size
    return Operation(
        key=key,
        implementations=implementations,
        setting=kind,
        prepare=prepare,
        flops=(flops, 2.5 * flops),
        moved=moved,
        scores=pairs * shapes.heads,
        attention=(kind, keys),
    )


def _attentions(shapes: Shapes) -> Iterator[Operation]:
    A, E, D = shapes.heads, shapes.head_size, shapes.hidden_size
    row = float(D * _BYTES)

    def temporal(B: int, T: int, S: int) -> Callable[[Draw, str], Prepared]:
        def prepare(draw: Draw, implementation: str) -> Prepared:
            from longtake.ops.temporal_attention import temporal_attention

            qkv = draw(B, T, S, 3, A, E).requires_grad_()
            return Prepared(forward=lambda: temporal_attention(qkv), inputs=(qkv,))

        return prepare

    def full(B: int, N: int) -> Callable[[Draw, str], Prepared]:
        def prepare(draw: Draw, implementation: str) -> Prepared:
            from longtake.ops.attention import self_attention

            qkv = draw(B, N, 3, A, E).requires_grad_()
            return Prepared(forward=lambda: self_attention(qkv), inputs=(qkv,))

        return prepare

    def text(draw: Draw, implementation: str) -> Prepared:
        from longtake.ops.text_attention import text_attention

        B, L = shapes.samples, shapes.text_tokens
        q = draw(B, shapes.tokens // B, A, E).requires_grad_()
        kv = draw(B, L, 2, A, E).requires_grad_()
        mask = torch.ones(B, L, dtype=torch.bool, device=q.device)
        return Prepared(forward=lambda: text_attention(q, kv, mask), inputs=(q, kv))

    yield _attention(
        shapes,
        "cross_attention",
        f"text attention {shapes.samples} x {shapes.tokens // shapes.samples} x "
        f"{shapes.text_tokens}",
        ("reference", "sdpa", "triton"),
        text,
        pairs=float(shapes.tokens * shapes.text_tokens),
        keys=shapes.text_tokens,
        moved=(2 * shapes.tokens * row, 4 * shapes.tokens * row),
    )
    for T in shapes.frames:
        places = shapes.tokens // T
        S = math.gcd(places, 1024)
        yield _attention(
            shapes,
            "temporal_attention",
            f"temporal attention {places} x {T}",
            ("reference", "sdpa", "cudnn", "triton"),
            temporal(places // S, T, S),
            pairs=float(shapes.tokens * T),
            keys=T,
            moved=(4 * shapes.tokens * row, 8 * shapes.tokens * row),
        )
    for keys in shapes.keys:
        batch = shapes.tokens // keys
        yield _attention(
            shapes,
            "self_attention",
            f"attention {batch} x {keys}",
            ("reference", "sdpa", "cudnn", "fa4", "triton"),
            full(batch, keys),
            pairs=float(batch * keys**2),
            keys=keys,
            moved=(4 * batch * keys * row, 8 * batch * keys * row),
        )
