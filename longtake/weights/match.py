"""Holds a checkpoint against a model: which tensor goes where, what is reshaped, what does not fit.

Only names, shapes, dtypes and the position buffers are looked at; nothing is written.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from longtake.models import ModelConfig
from longtake.models.positions import spatial_positions, temporal_positions
from longtake.weights.account import Account, Entry, LoadError, Status
from longtake.weights.infer import grid_of, is_position_table, scale_of
from longtake.weights.layouts import Layout, Piece, find_pieces

# What in a config decides the shape of a tensor: for messages.
_DECIDED_BY = {
    "y_embedder.embedding_table": "num_classes",
    "y_embedder.y_embedding": "max_caption_tokens and caption_channels",
    "y_embedder.y_proj.fc1": "caption_channels",
    "x_embedder.proj": "patch_size and in_channels",
    "final_layer.linear": "patch_size, in_channels and learn_sigma",
    "mlp.fc": "mlp_ratio",
}


def explain(
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
    targets = tensors_of(model)
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
            entry, warning = _compare_positions(key, kind, state[key], config_of(model))
            entries.append(entry)
            warnings += warning
    account = Account(layout.name, tuple(entries), tuple(warnings))
    if account.failures:
        raise LoadError(account)
    return account, by_target


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their plain names, whatever wraps the modules."""
    state: Iterable[tuple[str, Tensor]] = model.state_dict(keep_vars=True).items()
    return {
        key.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): value
        for key, value in state
    }


def config_of(model: nn.Module) -> ModelConfig:
    config = getattr(model, "config", None)
    assert isinstance(config, ModelConfig), "the model must be one of longtake.models"
    return config


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


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _x(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "scalar"
