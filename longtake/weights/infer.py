"""From the shapes and position buffers of a checkpoint to the config of the model that it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtake.models.config import SIZES, ModelConfig
from longtake.weights.layouts import LAYOUTS, NULL_CAPTION, Layout, find_pieces, num_blocks
from longtake.weights.read import WeightsError

# Sizes per head tried for a hidden size that no row of SIZES has, the public models' own first.
_HEAD_SIZES = (72, 64, 32)


@dataclass(frozen=True)
class Inferred:
    """What a checkpoint says about its model."""

    config: ModelConfig
    grid_THW: tuple[int | None, int | None, int | None]  # patches it was trained on, where stored
    notes: tuple[str, ...] = ()  # what had to be assumed


def infer_config(
    state: Mapping[str, Tensor],
    layout: Layout,
    *,
    diffusers_config: Mapping[str, Any] | None = None,
    num_heads: int | None = None,
) -> Inferred:
    """The model's config from the shapes of a checkpoint in a known layout.

    Heads leave no trace in the weights (but for a q/k norm): they are those of the row of `SIZES`
    with the same hidden size, so 16 for XL (72 wide) and L (64 wide), else hidden size / 72, / 64
    or / 32, the first that divides. `num_heads` or diffusers' config decide where given.

    Raises:
        WeightsError: a tensor that the config is read from is missing or makes no sense.
    """
    pieces, _ = find_pieces(layout, state)
    shapes = {piece.target: piece.shape(state) for piece in pieces}
    notes: list[str] = []
    hidden, in_channels, patch = _read_patch_embedding(shapes)
    mlp = _shape(shapes, "blocks.0.mlp.fc1.weight", 2)[0]
    out_channels = _shape(shapes, "final_layer.linear.weight", 2)[0] / math.prod(patch)
    if out_channels not in (in_channels, 2 * in_channels):
        raise WeightsError(
            f"final_layer.linear.weight gives {out_channels:g} channels per value, expected "
            f"{in_channels} or {2 * in_channels} (learned variance)"
        )
    known = dict(diffusers_config or {})
    heads = _positive(known, "num_attention_heads", int) if num_heads is None else num_heads
    heads = _heads(shapes, hidden, notes) if heads is None else int(heads)
    grid, settings = _read_positions(state, layout)
    if layout.rules:
        grid, settings = _diffusers_positions(known, layout, patch, notes)
        notes += _diffusers_differences(known, layout)
    elif "space_scale" not in settings:
        notes.append("no spatial position buffer: space_scale=1 and no base_size are assumed")
    config = ModelConfig(
        name=layout.model,
        **_size(hidden, num_blocks(shapes), heads),
        patch_size=patch,
        mlp_ratio=_mlp_ratio(mlp, hidden),
        in_channels=in_channels,
        learn_sigma=out_channels != in_channels,
        micro_conditioning="csize_embedder.mlp.0.weight" in shapes,
        **_condition(shapes),
        **settings,
    )
    return Inferred(config, grid, tuple(notes))


def _shape(shapes: Mapping[str, torch.Size], key: str, num_dims: int) -> torch.Size:
    shape = shapes.get(key)
    if shape is None or len(shape) != num_dims or 0 in shape:
        found = "is missing" if shape is None else f"has shape {tuple(shape)}"
        raise WeightsError(f"{key} {found}, expected {num_dims} dimensions: no config follows")
    return shape


def _read_patch_embedding(
    shapes: Mapping[str, torch.Size],
) -> tuple[int, int, tuple[int, int, int]]:
    """Hidden size, latent channels and patch size; a 2D patch lasts one frame."""
    key = "x_embedder.proj.weight"
    num_dims = 5 if len(shapes.get(key, ())) == 5 else 4
    hidden, in_channels, *patch = _shape(shapes, key, num_dims)
    pt, ph, pw = patch if num_dims == 5 else (1, *patch)
    return hidden, in_channels, (pt, ph, pw)


def _heads(shapes: Mapping[str, torch.Size], hidden: int, notes: list[str]) -> int:
    if q_norm := shapes.get("blocks.0.attn.q_norm.weight"):
        return hidden // q_norm[0]
    for size in SIZES.values():
        if size.hidden_size == hidden:
            return size.num_heads
    for head_size in _HEAD_SIZES:
        if hidden % head_size == 0:
            notes.append(f"num_heads={hidden // head_size} is assumed, {head_size} wide each")
            return hidden // head_size
    raise WeightsError(f"no rule for the heads of hidden_size={hidden}: give num_heads")


def _size(hidden: int, depth: int, num_heads: int) -> dict[str, Any]:
    """The named size, or the nearest with overrides."""
    for name, size in SIZES.items():
        if size.hidden_size == hidden:
            own = {"depth": depth, "num_heads": num_heads}
            return {"size": name, **{k: v for k, v in own.items() if v != getattr(size, k)}}
    return {"size": "XL", "hidden_size": hidden, "depth": depth, "num_heads": num_heads}


def _mlp_ratio(inner: int, hidden: int) -> float:
    """The ratio from which a model computes exactly this inner size, int(ratio * hidden)."""
    ratio = inner / hidden
    return ratio if int(ratio * hidden) == inner else math.nextafter(ratio, math.inf)


def _condition(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    table = "y_embedder.embedding_table.weight"
    if table in shapes:
        return {"num_classes": _shape(shapes, table, 2)[0] - 1}
    channels = _shape(shapes, "y_embedder.y_proj.fc1.weight", 2)[1]
    if NULL_CAPTION not in shapes:
        return {"caption_channels": channels}
    return {
        "caption_channels": channels,
        "max_caption_tokens": _shape(shapes, NULL_CAPTION, 2)[0],
    }


# -------------------------------------------------------------------------------------- positions


def _read_positions(
    state: Mapping[str, Tensor], layout: Layout
) -> tuple[tuple[int | None, int | None, int | None], dict[str, Any]]:
    """Grid and scales from the buffers themselves."""
    frames = height = width = None
    settings: dict[str, Any] = {}
    for key, kind in layout.positions.items():
        table = state.get(key)
        if table is None or not is_position_table(table):
            continue
        if kind == "time":
            frames = table.shape[1]
            if (scale := scale_of(table[0])) is not None:
                settings["time_scale"] = scale
            continue
        height, width = grid_of(table[0])
        if (scale := scale_of(table[0, :width, : table.shape[2] // 2])) is not None:
            settings["space_scale"] = scale
            if layout.model == "pixart":
                # PixArt stretches other sizes to the grid that it was trained on.
                settings["base_size"] = height
    return (frames, height, width), settings


def is_position_table(table: Tensor) -> bool:
    """Whether a buffer has the form of a table of positions: real, 1 x N x D."""
    return table.dim() == 3 and len(table) == 1 and table.numel() > 0 and table.is_floating_point()


def grid_of(table_SD: Tensor) -> tuple[int, int]:
    """Height and width of a spatial table: the columns' half repeats after one row."""
    columns_SF = table_SD[:, : table_SD.shape[1] // 2]
    same_S = (columns_SF == columns_SF[0]).all(dim=1)
    repeats = same_S[1:].nonzero()
    count = table_SD.shape[0]
    width = int(repeats[0]) + 1 if len(repeats) else count
    return (count // width, width) if count % width == 0 else (1, count)


def scale_of(table_ND: Tensor) -> float | None:
    """The number that positions 0, 1, ... of a one-dimensional table were divided by.

    The sine and cosine of the first frequency, 1, give the distance to the second position but for
    whole turns; those of a frequency near 0.1 count the turns. None if the table does not tell.
    """
    half = table_ND.shape[1] // 2
    if len(table_ND) < 2 or half < 1 or not table_ND[1].isfinite().all():
        return None
    sin_F, cos_F = table_ND[1, :half].tolist(), table_ND[1, half:].tolist()
    slow = half // 4
    coarse = math.atan2(sin_F[slow], cos_F[slow]) * 10_000 ** (slow / half)
    fine = math.atan2(sin_F[0], cos_F[0])
    step = fine + math.tau * round((coarse - fine) / math.tau)
    if step <= 0:
        return None
    # The short fraction that was meant, as far as the table's precision tells.
    tolerance = max(1e-5, 4 * torch.finfo(table_ND.dtype).eps)
    for denominator in (1, 2, 3, 4, 6, 8, 12, 16):
        nearest = round(denominator / step) / denominator
        if nearest > 0 and abs(nearest * step - 1) < tolerance:
            return nearest
    return 1 / step


def _diffusers_positions(
    known: Mapping[str, Any], layout: Layout, patch: tuple[int, int, int], notes: list[str]
) -> tuple[tuple[int | None, int | None, int | None], dict[str, Any]]:
    sample_size = _positive(known, "sample_size", int)
    if sample_size is None:
        notes.append("no config.json: space_scale=1 and no base_size are assumed")
        return (None, None, None), {}
    side = int(sample_size) // patch[1]
    scale = 1.0
    if layout.name == "diffusers-pixart":
        given = _positive(known, "interpolation_scale", int, float)
        scale = float(max(sample_size // 64, 1) if given is None else given)
    return (None, side, side), {"space_scale": scale, "base_size": side}


def _positive(known: Mapping[str, Any], key: str, *kinds: type) -> float | None:
    """A number of diffusers' config.json, None if it is not there."""
    value = known.get(key)
    if value is None or (type(value) in kinds and 0 < value < math.inf):
        return value
    raise WeightsError(f"config.json has {key}={value!r}, expected a positive number")


def _diffusers_differences(known: Mapping[str, Any], layout: Layout) -> list[str]:
    """What diffusers computes otherwise than the model that will hold its weights."""
    activation = known.get("activation_fn", "gelu-approximate")
    if activation != "gelu-approximate":
        raise WeightsError(
            f"activation_fn='{activation}' in config.json, expected gelu-approximate"
        )
    notes = []
    if layout.name == "diffusers-dit":
        notes.append(
            "diffusers' DiT spaces its timestep frequencies over 127 steps, DiT and Longtake over "
            "128: weights that were trained in diffusers meet slightly other timestep embeddings"
        )
    if (eps := known.get("norm_eps", 1e-6)) != 1e-6:
        notes.append(f"config.json has norm_eps={eps} in some norms, Longtake 1e-6 in all")
    return notes


def layout_of(name: str) -> Layout:
    """The layout of that name.

    Raises:
        WeightsError: no such layout.
    """
    if name not in LAYOUTS:
        raise WeightsError(f"layout='{name}' is unknown: use one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
