"""The model's config in the header of our own safetensors files, as JSON of unknown origin."""

from __future__ import annotations

import dataclasses
import json
import math

from longtake.models import ModelConfig
from longtake.weights.layouts import LAYOUTS
from longtake.weights.read import WeightsError

CONFIG_KEY = "longtake.config"


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
