"""Writes weights for others: safetensors in the public names, and diffusers' folders.

Files appear complete or not at all: they are written under another name and then moved.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import longtake
from longtake.models import ModelConfig
from longtake.models.positions import spatial_positions, temporal_positions
from longtake.weights.header import CONFIG_KEY, config_to_json
from longtake.weights.layouts import LAYOUTS, rename_for
from longtake.weights.read import EXTRA_FILE, WeightsError

MAX_SHARD_BYTES = 5 * 10**9
_DIFFUSERS_STEM = "diffusion_pytorch_model"


def export_safetensors(
    source: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    *,
    config: ModelConfig | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> list[Path]:
    """Writes a model or a state dict to `path`, or to shards and an index beside it when it is
    large.

    The names and shapes are those of the public checkpoints. The header records the model's config
    (taken from a model of ours, else from `config`), Longtake's version and `metadata`, for example
    where the weights come from. Returns the files written, the index last.

    Raises:
        WeightsError: the name does not end in .safetensors, or a file is in the way.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: the name must end in .safetensors")
    if config is None and isinstance(source, nn.Module):
        config = getattr(source, "config", None)
    header = {**(metadata or {}), "format": "pt", "longtake.version": longtake.__version__}
    if config is not None:
        header[CONFIG_KEY] = config_to_json(config)
    return _write(_state_of(source), path, header, dtype, max_shard_bytes, overwrite)


def with_positions(
    state: Mapping[str, Tensor], config: ModelConfig, grid_THW: tuple[int, int, int]
) -> dict[str, Tensor]:
    """The state dict with the position buffers that the original code stores for one grid of
    patches.

    Longtake computes positions for every shape and leaves them out; the originals' strict loading
    wants them.
    """
    frames, height, width = grid_THW
    tables = {
        "space": lambda: spatial_positions(height, width, config),
        "time": lambda: temporal_positions(frames, config),
    }
    buffers = {key: tables[kind]()[None] for key, kind in LAYOUTS[config.name].positions.items()}
    return {**buffers, **state}


def export_diffusers(
    source: nn.Module | Mapping[str, Tensor],
    folder: str | Path,
    *,
    config: ModelConfig | None = None,
    sample_size: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes a dit or pixart as a folder for diffusers' `from_pretrained`; returns the files
    written.

    `sample_size` is the height and width in latent pixels for which diffusers lays out its
    positions; by default that of `config.base_size`. A pixart's null caption, unknown to diffusers,
    goes into a file beside the weights that `read_weights` finds again.

    diffusers' DiTTransformer2DModel spaces timestep frequencies over 127 steps instead of DiT's
    128, which no weights can undo: call `use_original_timesteps` on the loaded model to get DiT's
    outputs.

    Raises:
        WeightsError: diffusers has no such model, or no place for one of the settings.
    """
    if config is None:
        config = getattr(source, "config", None)
    if config is None:
        raise WeightsError("a state dict does not say what model it is: pass config")
    folder, state = Path(folder), _state_of(source)
    settings = diffusers_config(config, sample_size=sample_size)
    layout = LAYOUTS[f"diffusers-{config.name}"]
    if not overwrite and (folder / "config.json").exists():
        raise WeightsError(f"{folder}: already holds a config.json: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)

    header = {"format": "pt", "longtake.version": longtake.__version__}
    weights = folder / f"{_DIFFUSERS_STEM}.safetensors"
    files = _write(rename_for(layout, state), weights, header, dtype, MAX_SHARD_BYTES, overwrite)
    extra = {key: state[key] for key in layout.without if key in state}
    if extra:
        files += _write(extra, folder / EXTRA_FILE, header, dtype, MAX_SHARD_BYTES, overwrite)
    text = json.dumps(settings, indent=2) + "\n"
    files.append(_appear(folder / "config.json", lambda path: path.write_text(text)))
    return files


def diffusers_config(config: ModelConfig, *, sample_size: int | None = None) -> dict[str, Any]:
    """The config.json with which diffusers builds the same model.

    Raises:
        WeightsError: diffusers has no such model, or no place for one of the settings.
    """
    _check_expressible(config)
    depth, hidden_size, num_heads = config.dimensions
    patch = config.patch_size[1]
    if sample_size is None:
        if config.base_size is None:
            raise WeightsError(
                "diffusers lays out positions for one size: give sample_size, the height and width "
                "in latent pixels (pixels / 8)"
            )
        sample_size = config.base_size * patch
    side = sample_size // patch
    # diffusers stretches every grid to `side` positions, ours to base_size or not at all.
    scale = config.space_scale * (1.0 if config.base_size is None else side / config.base_size)
    shared = {
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": hidden_size // num_heads,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "num_attention_heads": num_heads,
        "num_layers": depth,
        "out_channels": config.out_channels,
        "patch_size": patch,
        "sample_size": sample_size,
        "upcast_attention": False,
    }
    if config.name == "dit":
        if scale != 1:
            raise WeightsError(
                f"diffusers' DiT has no scale for its positions, but here it is {scale:g} "
                f"(space_scale={config.space_scale:g}, base_size={config.base_size})"
            )
        return {
            "_class_name": "DiTTransformer2DModel",
            **shared,
            "norm_type": "ada_norm_zero",
            "num_embeds_ada_norm": config.num_classes,
        }
    return {
        "_class_name": "PixArtTransformer2DModel",
        **shared,
        "caption_channels": config.caption_channels,
        "cross_attention_dim": hidden_size,
        "interpolation_scale": scale,
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
        "use_additional_conditions": config.micro_conditioning,
    }


def use_original_timesteps(diffusers_dit: nn.Module) -> None:
    """Gives a loaded DiTTransformer2DModel the timestep frequencies that DiT is trained with."""
    for module in diffusers_dit.modules():
        if hasattr(module, "downscale_freq_shift"):
            object.__setattr__(module, "downscale_freq_shift", 0)


def _check_expressible(config: ModelConfig) -> None:
    if config.name == "latte":
        raise WeightsError(
            "diffusers has no class-conditional Latte: its LatteTransformer3DModel is the "
            "text-to-video one, with cross-attention and one modulation for all blocks: export to "
            "safetensors"
        )
    if config.name not in ("dit", "pixart"):
        raise WeightsError(f"diffusers has no {config.name}: export to safetensors")
    pt, ph, pw = config.patch_size
    if pt != 1 or ph != pw:
        raise WeightsError(
            f"patch_size={config.patch_size}: diffusers needs one frame and a square"
        )
    if config.mlp_ratio != 4:
        raise WeightsError(f"mlp_ratio={config.mlp_ratio:g}: diffusers' is always 4")


# ---------------------------------------------------------------------------------------- writing


def _state_of(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(source.state_dict() if isinstance(source, nn.Module) else source)


def _write(
    state: Mapping[str, Tensor],
    path: Path,
    header: Mapping[str, str],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    overwrite: bool,
) -> list[Path]:
    index = path.with_name(f"{path.name}.index.json")
    for file in (path, index):
        if file.exists() and not overwrite:
            raise WeightsError(f"{file} exists already: choose another name or allow overwriting")
    path.parent.mkdir(parents=True, exist_ok=True)
    shards = _split(state, dtype, max_shard_bytes)
    if len(shards) == 1:
        return [_save(state, path, header, dtype)]
    files, weight_map = [], {}
    for number, names in enumerate(shards, start=1):
        file = path.with_name(f"{path.stem}-{number:05}-of-{len(shards):05}.safetensors")
        files.append(_save({name: state[name] for name in names}, file, header, dtype))
        weight_map.update(dict.fromkeys(names, file.name))
    total = sum(_num_bytes(value, dtype) for value in state.values())
    content = {"metadata": {"total_size": total, **header}, "weight_map": weight_map}
    text = json.dumps(content, indent=2) + "\n"
    return [*files, _appear(index, lambda partial: partial.write_text(text))]


def _save(
    state: Mapping[str, Tensor], path: Path, header: Mapping[str, str], dtype: torch.dtype | None
) -> Path:
    # Cloned, because safetensors refuses tensors that share memory, such as diffusers' copies.
    own = {
        name: value.detach().to("cpu", _cast(value, dtype), copy=True).contiguous()
        for name, value in state.items()
    }
    return _appear(path, lambda partial: save_file(own, partial, metadata=dict(header)))


def _appear(path: Path, write: Callable[[Path], object]) -> Path:
    """Writes under a temporary name and moves the complete file into place."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _split(
    state: Mapping[str, Tensor], dtype: torch.dtype | None, max_shard_bytes: int
) -> list[list[str]]:
    """Names in order, in groups of at most so many bytes; a tensor is never cut."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, value in state.items():
        size += _num_bytes(value, dtype)
        if groups[-1] and size > max_shard_bytes:
            groups.append([])
            size = _num_bytes(value, dtype)
        groups[-1].append(name)
    return groups


def _cast(value: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and value.is_floating_point() else value.dtype


def _num_bytes(value: Tensor, dtype: torch.dtype | None) -> int:
    return value.numel() * _cast(value, dtype).itemsize
