"""The one way to make a function an operation of PyTorch: opaque to torch.compile, cheap to call.

    @operation("longtake::double")
    def _double(x: Tensor) -> Tensor: ...

    @register_fake(_double)
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

`torch.library.custom_op` makes the same operation, but wraps the function in Python that looks for
gradients to track, results that alias arguments and arguments to mark as changed. That costs more
than many a function; here the dispatcher calls it directly. What the wrapping looked after, an
operation must keep by itself, and `torch.library.opcheck` in its test proves it: results share no
memory with arguments, and `mutates_args` names what is written to.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch._library.custom_ops import get_library_allowing_overwrite
from torch._ops import OpOverload
from torch.autograd.graph import increment_version

P = ParamSpec("P")
R = TypeVar("R")

# What is registered lives as long as its library.
_LIBRARIES: dict[str, torch.library.Library] = {}


def operation(
    name: str, *, mutates_args: Sequence[str] = ()
) -> Callable[[Callable[P, R]], OpOverload[P, R]]:
    """Registers a function for all devices as `namespace::name` and puts the operation, an
    OpOverload, in its place. The schema is that of its annotations.

    Without `register_autograd` it is not differentiable: it is called where no gradient is tracked,
    like forward and backward of an autograd.Function. A name registered again is replaced.
    """
    namespace, bare_name = name.split("::")

    def register(function: Callable[P, R]) -> OpOverload[P, R]:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        library = get_library_allowing_overwrite(namespace, bare_name)
        library.define(bare_name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Called from a frame that torch.compile left to Python, the function is not to be traced.
        untraced = torch.compiler.disable(_count_changes(function, mutates_args))
        library.impl(bare_name, untraced, "CompositeExplicitAutograd")
        _LIBRARIES[name] = library
        if schema.endswith("-> ()"):  # else the function itself would meet tensors without data
            torch.library.register_fake(name, lambda *_, **__: None, lib=library)
        return getattr(getattr(torch.ops, namespace), bare_name).default

    return register


def _count_changes(function: Callable[P, R], mutates_args: Sequence[str]) -> Callable[P, R]:
    """The function, counting its changes as PyTorch's own operations do.

    Else a kernel could change what was saved for a backward, and nobody would be told.
    """
    if not mutates_args:
        return function
    positions = [list(inspect.signature(function).parameters).index(x) for x in mutates_args]

    @functools.wraps(function)
    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        result = function(*args, **kwargs)
        increment_version([args[position] for position in positions])  # pyright: ignore
        return result

    return counted


def register_fake(
    operation: OpOverload[P, R],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates the function that says what shapes and dtypes an operation returns."""
    name = operation.name()
    return torch.library.register_fake(name, lib=_LIBRARIES[name])


def register_autograd(
    operation: OpOverload[..., Any],
    backward: Callable[..., Any],
    *,
    setup_context: Callable[..., None],
) -> None:
    """Makes an operation differentiable, see `torch.library.register_autograd`."""
    name = operation.name()
    torch.library.register_autograd(
        name, backward, setup_context=setup_context, lib=_LIBRARIES[name]
    )
