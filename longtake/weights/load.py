"""Strict loading: a checkpoint and a model must explain each other key by key, or nothing is
written.

from longtake.weights import load_model
model, account = load_model("PixArt-XL-2-512x512.pth")
print(account)
noise_estimate = model(latents_BCTHW, t_B, prompt_embeds_BLK=embeds, prompt_mask_BL=mask)
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longtake.models import ModelConfig, build_model_from_config
from longtake.models.positions import spatial_positions, temporal_positions
from longtake.weights.account import Account, Entry, LoadError, Status
from longtake.weights.infer import (
    Inferred,
    grid_of,
    infer_config,
    is_position_table,
    layout_of,
    scale_of,
)
from longtake.weights.layouts import (
    LAYOUTS,
    Layout,
    LayoutName,
    Piece,
    detect_layout,
    find_pieces,
    num_blocks,
)
from longtake.weights.read import WeightsError, WeightsFile, read_weights

Write = Callable[[Tensor, Tensor], object]

# Key in the header of our own safetensors files.
CONFIG_KEY = "longtake.config"

# What in a config decides the shape of a tensor: for messages.
_DECIDED_BY = {
    "y_embedder.embedding_table": "num_classes",
    "y_embedder.y_embedding": "max_caption_tokens and caption_channels",
    "y_embedder.y_proj.fc1": "caption_channels",
    "x_embedder.proj": "patch_size and in_channels",
    "final_layer.linear": "patch_size, in_channels and learn_sigma",
    "mlp.fc": "mlp_ratio",
}


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
    account, pieces = _explain(model, state, chosen)
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
    config = _config_of(model)
    if config.name != "stdit":
        raise WeightsError(f"only a stdit starts unchanged from PixArt, not a {config.name}")
    layout = LAYOUTS[detect_layout(state)]
    if layout.model != "pixart":
        raise WeightsError(f"an STDiT starts from PixArt weights, but these are {layout.title}")
    new = {
        key: "zero, so that the branch adds nothing at step 0"
        if ".attn_temp.proj." in key
        else "keeps its initial value behind the zero projection"
        for key in _targets(model)
        if ".attn_temp." in key
    }
    account, pieces = _explain(model, state, layout, new=new)
    _fill(model, state, pieces, write, zero=lambda key: ".attn_temp.proj." in key)
    return account


def load_model(
    path: str | Path,
    *,
    layout: LayoutName | Literal["auto"] = "auto",
    wrapper: str | None = None,
    num_heads: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> tuple[nn.Module, Account]:
    """Reads a weights file or folder, builds the model that it fits and loads it.

    The config comes from our own files' header or is inferred from shapes and position buffers;
    `overrides` (`space_scale=2.0`, ...) replace single fields of it. For `wrapper` see
    `read_weights`, for `num_heads` see `infer_config`.

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
    """`load_model` for weights that were read already; dtype None keeps the file's."""
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
    account, pieces = _explain(model, file.state, chosen, without="zeros are put there")
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


def config_to_json(config: ModelConfig) -> str:
    """A model's config as one line of JSON."""
    return json.dumps(dataclasses.asdict(config))


def config_from_json(text: str) -> ModelConfig:
    """The config that `config_to_json` wrote.

    Raises:
        WeightsError: it is not valid JSON, or names or values are not a config's.
    """
    try:
        values = json.loads(text)
        values["patch_size"] = tuple(values["patch_size"])
        config = ModelConfig(**values)
        config.dimensions  # noqa: B018  (an unknown size name fails here)
        is_known = config.name in LAYOUTS
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WeightsError(f"the header's {CONFIG_KEY} is not a model config: {error}") from error
    if not is_known:
        raise WeightsError(f"the header's {CONFIG_KEY} names an unknown model '{config.name}'")
    if [type(size) for size in config.patch_size] != [int] * 3 or min(config.patch_size) < 1:
        raise WeightsError(f"the header's {CONFIG_KEY} has patch_size={config.patch_size}")
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        kinds = {int, type(None)} if default is None else {type(default)}
        is_number = isinstance(default, float) and type(value) is int
        is_finite = not isinstance(value, float) or math.isfinite(value)
        if not (type(value) in kinds or is_number) or not is_finite:
            raise WeightsError(f"the header's {CONFIG_KEY} has {field.name}={value!r}")
    return config


# ------------------------------------------------------------------------------------ the account


def _explain(
    model: nn.Module,
    state: Mapping[str, Tensor],
    layout: Layout,
    *,
    new: Mapping[str, str] | None = None,
    without: str = "the model keeps its own",
) -> tuple[Account, dict[str, Piece]]:
    """The account of a load still to happen, and the piece for each of the model's tensors.

    `new` gives a reason for tensors that the file rightly lacks; `without` says what becomes of
    those that its layout cannot hold. Only names, shapes and dtypes of the model are looked at.

    Raises:
        LoadError: something is missing, unexpected or mismatched.
    """
    targets = _targets(model)
    pieces, unexplained = find_pieces(layout, state)
    by_target = {piece.target: piece for piece in pieces}
    entries: list[Entry] = []
    for key, target in targets.items():
        if key in by_target:
            entries.append(_meet(by_target[key], state, target))
        elif new and key in new:
            entries.append(Entry(Status.NEW, key, reason=new[key]))
        elif key in layout.without:
            entries.append(Entry(Status.NEW, key, reason=f"{layout.without[key]}: {without}"))
        else:
            entries.append(Entry(Status.MISSING, key))
    surplus = [key for piece in pieces if piece.target not in targets for key in piece.sources]
    entries += [Entry(Status.UNEXPECTED, None, (key,)) for key in (*surplus, *unexplained)]
    entries, warnings = _with_hints(entries), []
    for key, kind in layout.positions.items():
        if key in state:
            entry, warning = _compare_positions(key, kind, state[key], _config_of(model))
            entries.append(entry)
            warnings += warning
    account = Account(layout.name, tuple(entries), tuple(warnings))
    if account.failures:
        raise LoadError(account)
    return account, by_target


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
    for key, target in _targets(model).items():
        if key in pieces:
            value = pieces[key].read(state)
            write(target, value if value.shape == target.shape else value.reshape(target.shape))
        elif zero(key):
            write(target, torch.zeros(target.shape, dtype=target.dtype))


def _meet(piece: Piece, state: Mapping[str, Tensor], target: Tensor) -> Entry:
    """What happens when a piece of the file is put into a tensor of the model."""
    shape, first = piece.shape(state), state[piece.sources[0]]
    dtype = _dtype_name(first.dtype)
    if first.dtype != target.dtype:
        dtype += f" → {_dtype_name(target.dtype)}"
    parts = [state[source] for source in piece.sources]
    if any(part.dim() != first.dim() or part.shape[1:] != first.shape[1:] for part in parts):
        return Entry(Status.MISMATCHED, piece.target, piece.sources, "parts of different widths")
    if any(part.is_floating_point() != target.is_floating_point() for part in parts):
        return Entry(
            Status.MISMATCHED, piece.target, piece.sources, "not the kind of number", dtype
        )
    how = _how_to_fit(shape, target.shape)
    if how is None:
        setting = next((s for key, s in _DECIDED_BY.items() if key in piece.target), "")
        reason = f"{_x(shape)} in the file, {_x(target.shape)} in the model"
        reason += f" (set by {setting})" if setting else ""
        return Entry(Status.MISMATCHED, piece.target, piece.sources, reason, dtype)
    if how:
        return Entry(Status.RESHAPED, piece.target, piece.sources, how, dtype)
    if piece.how == "join":
        reason = f"{len(piece.sources)} tensors joined row by row"
        return Entry(Status.RESHAPED, piece.target, piece.sources, reason, dtype)
    if piece.how == "copies":
        reason = f"{len(piece.sources)} equal copies, one per block"
        return Entry(Status.RENAMED, piece.target, piece.sources, reason, dtype)
    status = Status.RENAMED if piece.how == "rename" else Status.LOADED
    return Entry(status, piece.target, piece.sources, dtype=dtype)


def _how_to_fit(shape: torch.Size, wanted: torch.Size) -> str | None:
    """Why a tensor has to be reshaped, empty if it fits as it is, None if it never will."""
    if shape == wanted:
        return ""
    # A patch of one frame is the same linear map in two and in three dimensions.
    if len(shape) == 4 and wanted == (*shape[:2], 1, *shape[2:]):
        return "2D patch weight gains a time dimension of one frame"
    if len(wanted) == 4 and shape == (*wanted[:2], 1, *wanted[2:]):
        return "3D patch weight of one frame loses its time dimension"
    return None


def _with_hints(entries: list[Entry]) -> list[Entry]:
    """Adds to each missing or unexpected key the nearest one on the other side."""
    missing = [e.target for e in entries if e.status is Status.MISSING and e.target]
    unexpected = [e.sources[0] for e in entries if e.status is Status.UNEXPECTED]
    # Enough for a message; comparing thousands with thousands would take minutes.
    near_missing, near_unexpected = unexpected[:200], missing[:200]
    result, budget = [], 200
    for entry in entries:
        nearest, hint = [], ""
        if entry.status is Status.MISSING and budget:
            nearest = difflib.get_close_matches(entry.target or "", near_missing, n=1)
            hint, budget = "the file has '{}'", budget - 1
        elif entry.status is Status.UNEXPECTED and budget:
            nearest = difflib.get_close_matches(entry.sources[0], near_unexpected, n=1)
            hint, budget = "the model has '{}'", budget - 1
        if nearest:
            entry = dataclasses.replace(entry, reason=hint.format(nearest[0]))
        result.append(entry)
    return result


def _compare_positions(
    key: str, kind: Literal["space", "time"], table: Tensor, config: ModelConfig
) -> tuple[Entry, list[str]]:
    """A stored position buffer beside what the model computes for the same grid."""
    hidden = config.dimensions.hidden_size
    if not is_position_table(table) or table.shape[2] != hidden:
        found = f"{_dtype_name(table.dtype)} {_x(table.shape)}"
        reason = f"{found} is no table of real positions 1xNx{hidden}"
        return Entry(Status.MISMATCHED, None, (key,), reason), []
    stored_ND = table[0].float()
    if kind == "time":
        grid = f"{len(stored_ND)} frames"
        ours_ND = temporal_positions(len(stored_ND), config)
        setting, ours, theirs = "time_scale", config.time_scale, scale_of(table[0])
    else:
        height, width = grid_of(stored_ND)
        grid = f"{height}x{width} patches"
        ours_ND = spatial_positions(height, width, config)
        stretch = 1.0 if config.base_size is None else config.base_size / width
        setting, ours = "space_scale", config.space_scale
        scale = scale_of(table[0, :width, : hidden // 2])
        theirs = None if scale is None else scale * stretch
    difference = float((stored_ND - ours_ND).abs().max())
    reason = f"computed for each shape; largest difference {difference:.1e} at {grid}"
    entry = Entry(Status.REBUILT, None, (key,), reason, _dtype_name(table.dtype))
    # Float32 sines of positions up to a few hundred, or the rounding of the stored dtype.
    if difference <= max(1e-3, 2 * torch.finfo(table.dtype).eps):
        return entry, []
    hint = "" if theirs is None else f"; the file's first step is that of {setting}={theirs:g}"
    warning = f"{key} differs by {difference:.2g} from the model's with {setting}={ours:g}{hint}"
    return entry, [warning]


# ------------------------------------------------------------------------------------ the model


def _choose_layout(
    model: nn.Module, state: Mapping[str, Tensor], layout: LayoutName | Literal["auto"]
) -> Layout:
    name = _config_of(model).name
    chosen = layout_of(detect_layout(state) if layout == "auto" else layout)
    if chosen.name == "dit" and name == "latte":
        chosen = LAYOUTS["latte"]  # they differ by a buffer that a file need not have
    if chosen.model != name:
        advice = ": use stdit_from_pixart" if (chosen.model, name) == ("pixart", "stdit") else ""
        raise WeightsError(f"the weights are {chosen.title}, the model is a {name}{advice}")
    return chosen


def _config_of(model: nn.Module) -> ModelConfig:
    config = getattr(model, "config", None)
    assert isinstance(config, ModelConfig), "the model must be one of longtake.models"
    return config


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their plain names, whatever wraps the modules."""
    state: Iterable[tuple[str, Tensor]] = model.state_dict(keep_vars=True).items()
    return {
        key.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): value
        for key, value in state
    }


def _widest_dtype(weights: list[Tensor]) -> torch.dtype:
    """The dtype that holds all of these without loss."""
    dtypes = {weight.dtype for weight in weights if weight.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _x(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "scalar"
