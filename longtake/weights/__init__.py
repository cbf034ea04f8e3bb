"""Weights in and out: public checkpoints are read strictly, key by key, and written for others.

    from longtake.models import build_model
    from longtake.weights import load_public, read_state_dict
    model = build_model("stdit", "XL", space_scale=0.5)
    print(load_public(model, read_state_dict("OpenSora-v1-HQ-16x256x256.pth")))
    out_BCTHW = model(latents_BCTHW, t_B, prompt_embeds_BLK=embeds_BLK, prompt_mask_BL=mask_BL)

`load_model(path)` finds name, size and positions by itself.
"""

from longtake.weights.account import Account, LoadError, Status
from longtake.weights.export import (
    export_diffusers,
    export_safetensors,
    use_original_timesteps,
    with_positions,
)
from longtake.weights.header import CONFIG_KEY, config_to_json
from longtake.weights.infer import Inferred, infer_config
from longtake.weights.layouts import LAYOUTS, Layout, LayoutName, detect_layout
from longtake.weights.load import (
    config_of_file,
    load_file,
    load_model,
    load_public,
    stdit_from_pixart,
)
from longtake.weights.read import WeightsError, WeightsFile, read_state_dict, read_weights

__all__ = [
    "CONFIG_KEY",
    "LAYOUTS",
    "Account",
    "Inferred",
    "Layout",
    "LayoutName",
    "LoadError",
    "Status",
    "WeightsError",
    "WeightsFile",
    "config_of_file",
    "config_to_json",
    "detect_layout",
    "export_diffusers",
    "export_safetensors",
    "infer_config",
    "load_file",
    "load_model",
    "load_public",
    "read_state_dict",
    "read_weights",
    "stdit_from_pixart",
    "use_original_timesteps",
    "with_positions",
]
