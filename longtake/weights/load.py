"""Strict loading: checkpoint and model explain each other key by key, or nothing is written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longtake.models import build_model_from_config
from longtake.weights.account import Account
from longtake.weights.header import CONFIG_KEY, config_from_json
from longtake.weights.infer import Inferred, infer_config, layout_of
from longtake.weights.layouts import (
    LAYOUTS,
    Layout,
    LayoutName,
    Piece,
    detect_layout,
    num_blocks,
)
from longtake.weights.match import config_of, explain, tensors_of
from longtake.weights.read import WeightsError, WeightsFile, read_weights

Write = Callable[[Tensor, Tensor], object]


def copy_full(target: Tensor, full: Tensor) -> None:
    """The plain way to write a tensor into a model; sharded models bring their own."""
    target.copy_(full)


def load_public(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    layout: LayoutName | Literal["auto"] = "auto",
    write: Write = copy_full,
) -> Account:
    """Loads a public checkpoint into a model of ours and says what became of every key.

    `write(target, full)` puts a full tensor into a parameter or buffer (cast to its dtype); it is
    called after everything has been checked, so a model is either loaded or untouched. Position
    buffers of the file are compared with what the model computes; a difference is a warning in the
    account.

    Raises:
        LoadError: a key is missing, unexpected or of the wrong shape; carries the account.
        WeightsError: the layout is unknown or belongs to another model.
    """
    chosen = _choose_layout(model, state, layout)
    account, pieces = explain(model, state, chosen)
    _fill(model, state, pieces, write, zero=lambda key: False)
    return account


def stdit_from_pixart(
    model: nn.Module, state: Mapping[str, Tensor], *, write: Write = copy_full
) -> Account:
    """Starts an STDiT from PixArt weights as Open-Sora 1.0 did: at step 0 each frame is PixArt's.

    All shared tensors are loaded, the patch weight gains a time dimension, and the projection of
    each block's temporal branch becomes zero, so that the branch adds nothing yet. Its qkv keeps
    the model's own initial values: call `init_weights` first.

    Raises:
        LoadError: a key is missing, unexpected or of the wrong shape; carries the account.
        WeightsError: the model is no stdit, or the weights are not PixArt's.
    """
    config = config_of(model)
    if config.name != "stdit":
        raise WeightsError(f"only a stdit starts unchanged from PixArt, not a {config.name}")
    layout = LAYOUTS[detect_layout(state)]
    if layout.model != "pixart":
        raise WeightsError(f"an STDiT starts from PixArt weights, but these are {layout.title}")
    new = {
        key: "zero, so that the branch adds nothing at step 0"
        if ".attn_temp.proj." in key
        else "keeps its initial value behind the zero projection"
        for key in tensors_of(model)
        if ".attn_temp." in key
    }
    account, pieces = explain(model, state, layout, new=new)
    _fill(model, state, pieces, write, zero=lambda key: ".attn_temp.proj." in key)
    return account


def load_model(
    path: str | Path,
    *,
    layout: LayoutName | Literal["auto"] = "auto",
    wrapper: str | None = None,
    num_heads: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    **overrides: Any,
) -> tuple[nn.Module, Account]:
    """Reads a weights file or folder, builds the model that it fits and loads it.

    The config comes from our own files' header or is inferred from shapes and position buffers;
    `overrides` (`space_scale=2.0`, ...) replace single fields of it. dtype None keeps the file's.
    For `wrapper` see `read_weights`, for `num_heads` see `infer_config`.

    Raises:
        WeightsError: the file cannot be read or recognized; LoadError (one of these) if keys are
        wrong.
    """
    file = read_weights(path, wrapper=wrapper)
    return load_file(
        file, layout=layout, num_heads=num_heads, device=device, dtype=dtype, **overrides
    )


def load_file(
    file: WeightsFile,
    *,
    layout: LayoutName | Literal["auto"] = "auto",
    num_heads: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    **overrides: Any,
) -> tuple[nn.Module, Account]:
    """`load_model` for weights that were read already."""
    inferred, chosen = config_of_file(file, layout=layout, num_heads=num_heads)
    config = dataclasses.replace(inferred.config, **overrides)
    try:
        with torch.device("meta"):
            model = build_model_from_config(config)
    except (RuntimeError, ArithmeticError, TypeError) as error:
        raise WeightsError(f"{file.source}: no model has this config: {config}") from error
    weights = [value for key, value in file.state.items() if key not in chosen.positions]
    model = model.to(dtype or _widest_dtype(weights))
    # Memory is allocated only for a model that the file fills.
    account, pieces = explain(model, file.state, chosen, without="zeros are put there")
    model = model.to_empty(device=device)
    _fill(model, file.state, pieces, copy_full, zero=lambda key: True)
    return model, dataclasses.replace(account, warnings=(*inferred.notes, *account.warnings))


def config_of_file(
    file: WeightsFile,
    *,
    layout: LayoutName | Literal["auto"] = "auto",
    num_heads: int | None = None,
) -> tuple[Inferred, Layout]:
    """What a file says about its model, and the layout it is in.

    Raises:
        WeightsError: the layout is unknown or the config in the header is not one of ours.
    """
    header = file.metadata.get(CONFIG_KEY)
    if header is not None:
        config, depth = config_from_json(header), num_blocks(file.state)
        if config.dimensions.depth != depth:
            raise WeightsError(f"{file.source}: {depth} blocks, but the header says {config}")
        return Inferred(config, (None, None, None)), LAYOUTS[config.name]
    chosen = layout_of(detect_layout(file.state) if layout == "auto" else layout)
    inferred = infer_config(file.state, chosen, diffusers_config=file.config, num_heads=num_heads)
    return inferred, chosen


@torch.no_grad()
def _fill(
    model: nn.Module,
    state: Mapping[str, Tensor],
    pieces: Mapping[str, Piece],
    write: Write,
    *,
    zero: Callable[[str], bool],
) -> None:
    """Writes every piece, and zeros into those of the other tensors that `zero` names."""
    for key, target in tensors_of(model).items():
        if key in pieces:
            value = pieces[key].read(state)
            write(target, value if value.shape == target.shape else value.reshape(target.shape))
        elif zero(key):
            write(target, torch.zeros(target.shape, dtype=target.dtype))


def _choose_layout(
    model: nn.Module, state: Mapping[str, Tensor], layout: LayoutName | Literal["auto"]
) -> Layout:
    name = config_of(model).name
    chosen = layout_of(detect_layout(state) if layout == "auto" else layout)
    if chosen.name == "dit" and name == "latte":
        chosen = LAYOUTS["latte"]  # they differ by a buffer that a file need not have
    if chosen.model != name:
        advice = ": use stdit_from_pixart" if (chosen.model, name) == ("pixart", "stdit") else ""
        raise WeightsError(f"the weights are {chosen.title}, the model is a {name}{advice}")
    return chosen


def _widest_dtype(weights: list[Tensor]) -> torch.dtype:
    """The dtype that holds all of these without loss."""
    dtypes = {weight.dtype for weight in weights if weight.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32
