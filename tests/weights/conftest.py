"""Checkpoints in the public key layouts, from rules of their own: no model of ours is asked."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def embedders(D: int, patch: tuple[int, ...], channels: int = 4) -> Shapes:
    return {
        "x_embedder.proj.weight": (D, channels, *patch),
        "x_embedder.proj.bias": (D,),
        **linear("t_embedder.mlp.0", D, 256),
        **linear("t_embedder.mlp.2", D, D),
    }


def attention_and_mlp(block: str, D: int) -> Shapes:
    return {
        **linear(f"{block}.attn.qkv", 3 * D, D),
        **linear(f"{block}.attn.proj", D, D),
        **linear(f"{block}.mlp.fc1", 4 * D, D),
        **linear(f"{block}.mlp.fc2", D, 4 * D),
    }


def dit_shapes(D: int, depth: int, classes: int, positions: Shapes) -> Shapes:
    shapes = {**positions, **embedders(D, (2, 2))}
    shapes["y_embedder.embedding_table.weight"] = (classes + 1, D)
    for i in range(depth):
        shapes |= attention_and_mlp(f"blocks.{i}", D)
        shapes |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * D, D)
    return (
        shapes
        | linear("final_layer.linear", 32, D)
        | linear("final_layer.adaLN_modulation.1", 2 * D, D)
    )


def pixart_shapes(
    D: int,
    depth: int,
    positions: Shapes,
    *,
    K: int = 4096,
    tokens: int = 120,
    patch: tuple[int, ...] = (2, 2),
    micro: bool = False,
    temporal: bool = False,
) -> Shapes:
    shapes = {**positions, **embedders(D, patch), **linear("t_block.1", 6 * D, D)}
    shapes["y_embedder.y_embedding"] = (tokens, K)
    shapes |= linear("y_embedder.y_proj.fc1", D, K) | linear("y_embedder.y_proj.fc2", D, D)
    for i in range(depth):
        shapes[f"blocks.{i}.scale_shift_table"] = (6, D)
        shapes |= attention_and_mlp(f"blocks.{i}", D)
        shapes |= linear(f"blocks.{i}.cross_attn.q_linear", D, D)
        shapes |= linear(f"blocks.{i}.cross_attn.kv_linear", 2 * D, D)
        shapes |= linear(f"blocks.{i}.cross_attn.proj", D, D)
        if temporal:
            shapes |= linear(f"blocks.{i}.attn_temp.qkv", 3 * D, D)
            shapes |= linear(f"blocks.{i}.attn_temp.proj", D, D)
    for name in ("csize_embedder", "ar_embedder") if micro else ():
        shapes |= linear(f"{name}.mlp.0", D // 3, 256) | linear(f"{name}.mlp.2", D // 3, D // 3)
    shapes["final_layer.scale_shift_table"] = (2, D)
    return shapes | linear("final_layer.linear", 32, D)


def shapes_of(layout: str, D: int, depth: int, *, side: int = 4, frames: int = 3, **text) -> Shapes:
    """Keys and shapes of a public checkpoint."""
    space, time = (1, side * side, D), (1, frames, D)
    match layout:
        case "dit":
            return dit_shapes(D, depth, text.get("classes", 10), {"pos_embed": space})
        case "latte":
            positions = {"pos_embed": space, "temp_embed": time}
            return dit_shapes(D, depth, text.get("classes", 10), positions)
        case "opensora-dit":
            positions = {"pos_embed_spatial": space, "pos_embed_temporal": time}
            shapes = dit_shapes(D, depth, text.get("classes", 10), positions)
            return shapes | {"x_embedder.proj.weight": (D, 4, 1, 2, 2)}
        case "pixart":
            return pixart_shapes(D, depth, {"pos_embed": space}, **text)
        case "opensora-pixart":
            positions = {"pos_embed": space, "pos_embed_temporal": time}
            return pixart_shapes(D, depth, positions, patch=(1, 2, 2), **text)
        case "stdit":
            positions = {"pos_embed": space, "pos_embed_temporal": time}
            return pixart_shapes(D, depth, positions, patch=(1, 2, 2), temporal=True, **text)
    raise AssertionError(layout)


def sincos(positions: np.ndarray, D: int) -> np.ndarray:
    """Sines then cosines, float64 (len(positions), D)."""
    omega = 1 / 10000 ** (np.arange(D // 2) / (D / 2))
    angles = np.outer(positions, omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def spatial_table(height: int, width: int, D: int, scale: float = 1.0) -> Tensor:
    """Position buffer 1 x (height width) x D: the column's half first."""
    rows, columns = np.divmod(np.arange(height * width), width)
    halves = [sincos(columns / scale, D // 2), sincos(rows / scale, D // 2)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()[None]


def temporal_table(frames: int, D: int, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(sincos(np.arange(frames) / scale, D)).float()[None]


def make_state(
    layout: str,
    *,
    D: int = 144,
    depth: int = 2,
    space_scale: float = 1.0,
    time_scale: float = 1.0,
    seed: int = 0,
    **sizes,
) -> dict[str, Tensor]:
    """A small random checkpoint with true position buffers."""
    if layout in ("pixart", "opensora-pixart", "stdit"):
        sizes = {"K": 24, "tokens": 6, **sizes}
    shapes = shapes_of(layout, D, depth, **sizes)
    generator = torch.Generator().manual_seed(seed)
    state = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for key in state:
        if key in ("pos_embed_temporal", "temp_embed"):
            state[key] = temporal_table(shapes[key][1], D, time_scale)
        elif key in ("pos_embed", "pos_embed_spatial"):
            side = round(shapes[key][1] ** 0.5)
            state[key] = spatial_table(side, side, D, space_scale)
    return state


@pytest.fixture(scope="session")
def public_shapes() -> Callable[..., Shapes]:
    return shapes_of


@pytest.fixture(scope="session")
def public_state() -> Callable[..., dict[str, Tensor]]:
    return make_state


@pytest.fixture(scope="session")
def position_table() -> Callable[..., Tensor]:
    return spatial_table
