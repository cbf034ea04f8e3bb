"""The operations that `longtake.ops.numerics` checks: their inputs and shapes, and what is right.

Letters: B batch, N tokens, T frames, S patches per frame, L text tokens, D hidden size, A heads,
E size per head, P weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from longtake.ops import kernels
from longtake.ops.attention import (
    backend_problem,
    self_attention,
)
from longtake.ops.kernels import triton_problem
from longtake.ops.partial_attention import (
    accumulation_dtype,
    merge_part,
    partial_attention,
    partial_attention_backward,
    pick_partial_backend,
)
from longtake.ops.plain_attention import attention_reference
from longtake.ops.sincos import sincos

Shape = dict[str, int]
Outputs = Tensor | tuple[Tensor, ...]
Draw = Callable[[Shape, Generator], dict[str, Tensor]]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Triton's interpreter keeps bfloat16 as integers and would multiply those.
INTERPRETED_DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation with all of its implementations."""

    setting: str  # the field of KernelConfig that picks one
    implementations: tuple[kernels.AttentionBackend, ...]
    draw: Draw  # float64 arguments in their order, by the names that a report gives them
    run: Callable[..., Outputs]
    reference: Callable[..., Outputs]  # in float64 what is right
    plain: Callable[..., Outputs]  # in the arguments' dtype what is allowed half the error
    outputs: tuple[str, ...] = ("out",)
    float32_inputs: frozenset[str] = frozenset()  # whatever the dtype of the rest
    is_differentiable: bool = True

    shape_for: Callable[..., Shape]  # of keys, head size and heads, or of a hidden size
    shapes: tuple[Shape, ...]
    bfloat16_shapes: tuple[Shape, ...]  # each may compile kernels of its own
    small_shapes: tuple[Shape, ...]  # for the CPU

    def cases(
        self, device: torch.device, implementation: str
    ) -> Iterator[tuple[torch.dtype, Shape]]:
        """Dtypes and shapes to check."""
        if device.type == "cpu":
            dtypes = INTERPRETED_DTYPES if implementation == "triton" else DTYPES
            yield from ((dtype, shape) for dtype in dtypes for shape in self.small_shapes)
            return
        yield from ((dtype, shape) for dtype in DTYPES for shape in self.shapes)
        # It compiles for half a minute; what a run needs of it is checked before the run as well.
        if implementation != "fa4":
            yield from ((torch.bfloat16, shape) for shape in self.bfloat16_shapes)

    def problem(
        self,
        implementation: kernels.AttentionBackend,
        device: torch.device,
        dtype: torch.dtype,
        shape: Shape,
    ) -> str | None:
        """Why an implementation cannot run here, or None if it can."""
        if "E" in shape:
            return backend_problem(implementation, device, dtype, shape["E"])
        return triton_problem(device) if implementation == "triton" else None


def _named(module: str, name: str) -> Callable[..., Outputs]:
    """A function of an operation's file, found when it is called: what cannot even be imported is
    the failure of its own check."""

    def call(*args: Any, **kwargs: Any) -> Outputs:
        return getattr(importlib.import_module(f"longtake.ops.{module}"), name)(*args, **kwargs)

    return call


# Attention. Plain torch is here what one writes by hand in one dtype; the references' float32
# scores are a stricter measure than any fused kernel meets.


def _plain_attention(
    q_BNAE: Tensor, k_BLAE: Tensor, v_BLAE: Tensor, key_mask_BL: Tensor | None = None
) -> Tensor:
    scores_BANL = torch.einsum("bnae,blae->banl", q_BNAE, k_BLAE) * q_BNAE.shape[-1] ** -0.5
    if key_mask_BL is not None:
        is_empty_B = ~key_mask_BL.any(dim=1)
        key_mask_BL = key_mask_BL | is_empty_B[:, None]
        v_BLAE = v_BLAE.masked_fill(is_empty_B[:, None, None, None], 0)
        scores_BANL = scores_BANL.masked_fill(~key_mask_BL[:, None, None, :], float("-inf"))
    return torch.einsum("banl,blae->bnae", scores_BANL.softmax(dim=-1), v_BLAE)


def _packed(attend: Callable[[Tensor], Outputs]) -> Callable[..., Outputs]:
    """Of q, k and v as one product; dimension -3 tells them apart."""
    return lambda *qkv: attend(torch.stack(qkv, dim=-3))


def _over_frames(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention at every place, through copies with the places in the batch."""

    def attend_frames(*qkv: Tensor) -> Tensor:
        out = attend(*(x.transpose(1, 2).flatten(0, 1) for x in qkv))
        return out.unflatten(0, (len(qkv[0]), -1)).transpose(1, 2)

    return attend_frames


class _InTwoParts(torch.autograd.Function):
    """Attention to two thirds of the keys and to the rest, as it is put together around a ring."""

    @staticmethod
    def forward(ctx: Any, q_BNAE: Tensor, k_BNAE: Tensor, v_BNAE: Tensor) -> Tensor:
        N, E = q_BNAE.shape[1], q_BNAE.shape[-1]
        ctx.lengths = [N - N // 3, N // 3]
        ctx.backend = pick_partial_backend(
            keys=N, head_size=E, dtype=q_BNAE.dtype, device=q_BNAE.device
        )
        first, last = (
            partial_attention(ctx.backend, q_BNAE, k_BLAE, v_BLAE)
            for k_BLAE, v_BLAE in _parts(k_BNAE, v_BNAE, ctx.lengths)
        )
        out_BNAE, lse_BAN = first[0].to(accumulation_dtype(q_BNAE.dtype)), first[1]
        merge_part(out_BNAE, lse_BAN, *last)
        out_BNAE = out_BNAE.to(q_BNAE.dtype)
        ctx.save_for_backward(q_BNAE, k_BNAE, v_BNAE, out_BNAE, lse_BAN)
        return out_BNAE

    @staticmethod
    def backward(ctx: Any, dout_BNAE: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        q_BNAE, k_BNAE, v_BNAE, out_BNAE, lse_BAN = ctx.saved_tensors
        first, last = (
            partial_attention_backward(
                ctx.backend, dout_BNAE, q_BNAE, k_BLAE, v_BLAE, out_BNAE, lse_BAN
            )
            for k_BLAE, v_BLAE in _parts(k_BNAE, v_BNAE, ctx.lengths)
        )
        dtype = accumulation_dtype(q_BNAE.dtype)
        dq_BNAE = (first[0].to(dtype) + last[0].to(dtype)).to(q_BNAE.dtype)
        return dq_BNAE, *(
            torch.cat(parts, dim=1) for parts in zip(first[1:], last[1:], strict=True)
        )


def _parts(k_BNAE: Tensor, v_BNAE: Tensor, lengths: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(k_BNAE.split(lengths, dim=1), v_BNAE.split(lengths, dim=1), strict=True)


def _in_two_parts(q_BNAE: Tensor, k_BNAE: Tensor, v_BNAE: Tensor) -> Tensor:
    out_BNAE: Tensor = _InTwoParts.apply(q_BNAE, k_BNAE, v_BNAE)
    return out_BNAE


def _draw_qkv(shape: Shape, generator: Generator) -> dict[str, Tensor]:
    return {name: _normal(generator, *shape.values()) for name in "qkv"}


def _draw_text(shape: Shape, generator: Generator) -> dict[str, Tensor]:
    """A full caption, one of half the length, an empty one."""
    B, N, L, A, E = (shape[letter] for letter in "BNLAE")
    lengths = torch.tensor([L, (L + 1) // 2, 0])[torch.arange(B) % 3]
    return {
        "q": _normal(generator, B, N, A, E),
        "k": _normal(generator, B, L, A, E),
        "v": _normal(generator, B, L, A, E),
        "mask": torch.arange(L) < lengths[:, None],
    }


def _with_packed_text(attend: Callable[..., Outputs]) -> Callable[..., Outputs]:
    return lambda q, k, v, mask: attend(q, torch.stack((k, v), dim=2), mask)


def _self_shape(keys: int, head_size: int, num_heads: int = 2) -> Shape:
    # Scores in float64 are large.
    return {"B": 1, "N": keys, "A": num_heads if keys <= 1024 else 2, "E": head_size}


def _temporal_shape(frames: int, head_size: int, num_heads: int = 16) -> Shape:
    return {"B": 2, "T": frames, "S": 11 if frames <= 64 else 1, "A": num_heads, "E": head_size}


def _cross_shape(text_tokens: int, head_size: int, num_heads: int = 16) -> Shape:
    return {"B": 3, "N": 200, "L": text_tokens, "A": num_heads, "E": head_size}


_ATTENTIONS = {
    "self_attention": Operation(
        setting="self_attention",
        implementations=("triton", "fa4", "cudnn", "sdpa"),
        draw=_draw_qkv,
        run=_packed(self_attention),
        reference=attention_reference,
        plain=_plain_attention,
        shape_for=_self_shape,
        shapes=tuple({**_self_shape(keys, 72), "B": 2} for keys in (256, 1000, 1024, 4096)),
        bfloat16_shapes=tuple(_self_shape(keys, 64) for keys in (256, 1000, 1024, 4096)),
        small_shapes=({"B": 2, "N": 37, "A": 2, "E": 24},),
    ),
    "partial_attention": Operation(
        setting="self_attention",
        implementations=kernels.IN_PARTS,
        draw=_draw_qkv,
        run=_in_two_parts,
        reference=attention_reference,
        plain=_plain_attention,
        shape_for=_self_shape,
        shapes=(_self_shape(1024, 72),),
        bfloat16_shapes=(_self_shape(1000, 72), _self_shape(1000, 64)),
        small_shapes=({"B": 2, "N": 37, "A": 2, "E": 24},),
    ),
    "temporal_attention": Operation(
        setting="temporal_attention",
        implementations=("triton", "sdpa"),
        draw=_draw_qkv,
        run=_packed(_named("temporal_attention", "temporal_attention")),
        reference=_over_frames(attention_reference),
        plain=_over_frames(_plain_attention),
        shape_for=_temporal_shape,
        shapes=(_temporal_shape(16, 72),),
        bfloat16_shapes=(
            *(_temporal_shape(frames, 72) for frames in (1, 5, 17, 64)),
            _temporal_shape(16, 64),
        ),
        small_shapes=tuple({"B": 2, "T": T, "S": 3, "A": 1, "E": 24} for T in (1, 5, 17)),
    ),
    "cross_attention": Operation(
        setting="cross_attention",
        implementations=("triton", "sdpa"),
        draw=_draw_text,
        run=_with_packed_text(_named("text_attention", "text_attention")),
        reference=_with_packed_text(_named("text_attention", "text_attention_reference")),
        plain=_plain_attention,
        shape_for=_cross_shape,
        shapes=(_cross_shape(120, 72),),
        bfloat16_shapes=(*(_cross_shape(L, 72) for L in (1, 7)), _cross_shape(120, 64)),
        small_shapes=tuple({"B": 3, "N": 20, "L": L, "A": 1, "E": 24} for L in (1, 7)),
    ),
}


# Element-wise operations and the branches made of them, whose backward passes are their own.


def _hidden_shape(hidden_size: int) -> Shape:
    return {"B": 2, "N": 333, "D": hidden_size}


def _draw_for(**sizes: str) -> Draw:
    """Arguments of these sizes by letter; F is 4 D, H is D / 8, and a 1 is one row per sample."""

    def draw(shape: Shape, generator: Generator) -> dict[str, Tensor]:
        extents = {"1": 1, "F": 4 * shape["D"], "H": shape["D"] // 8, **shape}
        drawn = {}
        for name, letters in sizes.items():
            x = _normal(generator, *(extents[letter] for letter in letters))
            # A layer's weights keep the size of what passes through.
            drawn[name] = x * x.shape[1] ** -0.5 if name.startswith("weight") else x
        return drawn

    return draw


def _elementwise(
    name: str,
    draw: Draw,
    *,
    module: str | None = None,
    adapt: Callable[[Callable[..., Outputs]], Callable[..., Outputs]] = lambda function: function,
    **changes: Any,
) -> Operation:
    """An operation of the file of its name, or of another; `adapt` puts its arguments in place."""
    reference = adapt(_named(module or name, f"{name}_reference"))
    fields = {
        "setting": "elementwise",
        "implementations": ("triton",),
        "draw": draw,
        "run": adapt(_named(module or name, name)),
        "reference": reference,
        "plain": reference,
        "shape_for": _hidden_shape,
        "shapes": (_hidden_shape(1152),),
        "bfloat16_shapes": (_hidden_shape(384),),
        "small_shapes": ({"B": 2, "N": 9, "D": 40},),
    }
    return Operation(**fields | changes)


_ROWS = {"shift": "B1D", "scale": "B1D"}
_LAYER = {"weight": "DF", "bias": "D"}
_MLP = {"weight1": "FD", "bias1": "F", "weight2": "DF", "bias2": "D"}
# So few inputs for a sample's tokens that its gate goes into the weights.
_FEW_INPUTS = {"weight": "DH", "bias": "D"}
_FEW_INNER = {"weight1": "HD", "bias1": "H", "weight2": "DH", "bias2": "D"}


def _heads_shape(hidden_size: int) -> Shape:
    # The head size of the models of this width.
    head_size = 72 if hidden_size % 72 == 0 else 64
    return {"B": 2, "T": 5, "S": 33, "A": max(hidden_size // head_size, 1), "E": head_size}


def _draw_turned(shape: Shape, generator: Generator) -> dict[str, Tensor]:
    weights = {name: 1 + _normal(generator, shape["E"]) / 2 for name in ("q_weight", "k_weight")}
    return _draw_qkv(shape, generator) | weights


def _turned(qk_norm_rotary: Callable[..., Outputs]) -> Callable[..., Outputs]:
    def turned(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor) -> Outputs:
        num_frames, head_size = q.shape[1], q.shape[-1]
        table = sincos(torch.arange(num_frames, device=q.device), head_size // 2)
        qkv = torch.stack((q, k, v), dim=-3)
        return qk_norm_rotary(qkv, q_weight, k_weight, *table.chunk(2, dim=1))

    return turned


def _keeping(operation: Operation, name: str) -> Operation:
    """The branch when it keeps what the backward would compute again: other kernels' variants."""
    return replace(operation, run=partial(_named(name, name), recompute=False))


def _added_linear(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    return lambda x, h, weight, bias: function(x, None, h, weight, bias)


_ELEMENTWISE = {
    "norm_modulate": _elementwise("norm_modulate", _draw_for(x="BND", **_ROWS)),
    "gated_residual": _elementwise("gated_residual", _draw_for(x="BND", gate="B1D", y="BND")),
    "gelu": _elementwise("gelu", _draw_for(x="NF")),
    "column_sum": _elementwise("column_sum", _draw_for(x="NF"), is_differentiable=False),
    "merge_sample_gradients": _elementwise(
        "merge_sample_gradients",
        _draw_for(dsample="BDD", sums="BD", gate="BD", weight="DD", bias="D"),
        module="sample_weights",
        outputs=("dgate", "dweight", "dbias"),
        float32_inputs=frozenset({"sums"}),
        is_differentiable=False,
    ),
    "resize_heads": _elementwise(
        "resize_heads",
        _draw_for(x="BND"),
        adapt=lambda function: lambda x: function(x, x.shape[-1] + 24),
        is_differentiable=False,
    ),
    "modulated_linear": _elementwise(
        "modulated_linear",
        _draw_for(x="BND", **_ROWS, weight="DD", bias="D"),
        outputs=("x", "y"),
    ),
    "carried_linear": _elementwise(
        "carried_linear", _draw_for(x="BND", weight="DD", bias="D"), outputs=("x", "y")
    ),
    "qk_norm_rotary": _elementwise(
        "qk_norm_rotary",
        _draw_turned,
        adapt=_turned,
        shape_for=_heads_shape,
        shapes=(_heads_shape(1152),),
        bfloat16_shapes=({**_heads_shape(1152), "E": 64},),
        small_shapes=({"B": 2, "T": 3, "S": 2, "A": 2, "E": 24},),
    ),
    "gated_linear": _elementwise("gated_linear", _draw_for(x="BND", gate="B1D", h="BNF", **_LAYER)),
    "folded_linear": _elementwise(
        "gated_linear",
        _draw_for(x="BND", gate="B1D", h="BNH", **_FEW_INPUTS),
        small_shapes=({"B": 2, "N": 12, "D": 40},),
    ),
    "added_linear": _elementwise(
        "gated_linear", _draw_for(x="BND", h="BNF", **_LAYER), adapt=_added_linear
    ),
    "gated_mlp": _elementwise("gated_mlp", _draw_for(x="BND", **_ROWS, gate="B1D", **_MLP)),
    "folded_mlp": _elementwise(
        "gated_mlp",
        _draw_for(x="BND", **_ROWS, gate="B1D", **_FEW_INNER),
        small_shapes=({"B": 2, "N": 12, "D": 40},),
    ),
}
_ELEMENTWISE |= {
    f"{name} kept": _keeping(_ELEMENTWISE[name], branch)
    for name, branch in (
        ("modulated_linear", "modulated_linear"),
        ("gated_mlp", "gated_mlp"),
        ("folded_mlp", "gated_mlp"),
    )
}


# The optimizer's update changes its tensors in place and has no gradients.

_UPDATED = ("param", "exp_avg", "exp_avg_sq", "average")


def _draw_update(shape: Shape, generator: Generator) -> dict[str, Tensor]:
    drawn = {name: _normal(generator, shape["P"]) for name in (*_UPDATED, "gradient")}
    return drawn | {"exp_avg_sq": drawn["exp_avg_sq"].square()}


def _update(adamw_ema: Callable[..., Outputs]) -> Callable[..., Outputs]:
    def update(*tensors: Tensor) -> Outputs:
        *before, gradient = tensors
        one = torch.ones((), device=gradient.device)
        param, exp_avg, exp_avg_sq, average = after = [tensor.clone() for tensor in before]
        is_exact = param.dtype == torch.float64
        copy = torch.zeros_like(param, dtype=torch.float64 if is_exact else torch.bfloat16)
        adamw_ema(
            [param],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [average],
            [4 * one],
            clip_factor=0.5 * one,
            applied=one,
            # A large step, so that an error in it is one in the weights.
            lr=0.1,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.1,
            ema_rate=0.3,
            copies=[copy],
        )
        return *after, copy

    return update


def _weights_shape(hidden_size: int) -> Shape:
    return {"P": 100 * hidden_size + 3}


_OPTIMIZER_SHAPES = {
    "shape_for": _weights_shape,
    "shapes": (_weights_shape(1152),),
    "bfloat16_shapes": (),
    "small_shapes": ({"P": 5003},),
}
_OPTIMIZER = {
    "adamw_ema": _elementwise(
        "adamw_ema",
        _draw_update,
        adapt=_update,
        outputs=(*_UPDATED, "copy"),
        float32_inputs=frozenset(_UPDATED),
        is_differentiable=False,
        **_OPTIMIZER_SHAPES,
    ),
    "squared_norm": _elementwise(
        "squared_norm",
        lambda shape, generator: {"gradient": _normal(generator, shape["P"])},
        module="adamw_ema",
        adapt=lambda squared_norm: lambda gradient: squared_norm([gradient]),
        is_differentiable=False,
        **_OPTIMIZER_SHAPES,
    ),
}

OPERATIONS = _ATTENTIONS | _ELEMENTWISE | _OPTIMIZER


def _normal(generator: Generator, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=generator, dtype=torch.float64)
