"""From a name and a size to a model."""

from __future__ import annotations

from typing import Any

import torch

from longtake.models.config import ModelConfig, ModelName, SizeName
from longtake.models.dit import DiT
from longtake.models.init import init_weights
from longtake.models.latte import Latte
from longtake.models.pixart import PixArt
from longtake.models.stdit import STDiT
from longtake.models.stdit2 import STDiT2

Model = DiT | Latte | PixArt | STDiT | STDiT2

MODELS: dict[ModelName, type[Model]] = {
    "dit": DiT,
    "pixart": PixArt,
    "stdit": STDiT,
    "stdit2": STDiT2,
    "latte": Latte,
}


def build_model(name: ModelName, size: SizeName = "XL", **overrides: Any) -> Model:
    """A model by name and size; overrides are fields of `ModelConfig`.

    >>> model = build_model("stdit", "tiny", caption_channels=64)
    """
    return build_model_from_config(ModelConfig(name=name, size=size, **overrides))


def build_model_from_config(config: ModelConfig) -> Model:
    """The model of a config, with its first weights of seed 0, on the default device.

    Under `torch.device("meta")` nothing is allocated or computed.

    Raises:
        ValueError: sizes do not fit together, or a setting does not exist for this kind of model.
    """
    _check(config)
    device = torch.get_default_device()
    with torch.device("meta"):
        model = MODELS[config.name](config)
    if device.type != "meta":
        model.to_empty(device=device)
        init_weights(model, seed=0)
    return model


def _check(config: ModelConfig) -> None:
    if config.name not in MODELS:
        raise ValueError(
            f"model name={config.name!r} does not exist: use one of {', '.join(MODELS)}"
        )
    depth, hidden_size, num_heads = config.dimensions
    sizes = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads}
    for name in ("in_channels", "num_classes", "caption_channels", "max_caption_tokens"):
        sizes[name] = getattr(config, name)
    for name, size in (*sizes.items(), ("patch_size", min(config.patch_size))):
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    if hidden_size % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide hidden_size={hidden_size}")
    if hidden_size % 4:
        raise ValueError(
            f"hidden_size={hidden_size} must be divisible by 4: positions take a quarter each for "
            f"sine and cosine of row and column"
        )
    if config.name == "stdit2" and hidden_size // num_heads % 2:
        raise ValueError(
            f"hidden_size / num_heads = {hidden_size // num_heads} must be even: stdit2's rotary "
            f"positions turn pairs of values"
        )
    if config.micro_conditioning and config.name != "pixart":
        raise ValueError(f"micro_conditioning exists for pixart only, not for {config.name}")
    if config.micro_conditioning and hidden_size % 3:
        raise ValueError(
            f"hidden_size={hidden_size} must be divisible by 3 for micro_conditioning: height, "
            f"width and aspect ratio take a third each"
        )
    if config.base_size is not None and config.base_size < 1:
        raise ValueError(f"base_size={config.base_size} must be at least 1, or None")
    for scale in ("space_scale", "time_scale"):
        if getattr(config, scale) <= 0:
            raise ValueError(f"{scale}={getattr(config, scale)} must be positive")
