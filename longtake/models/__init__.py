"""Diffusion transformers in plain single-device PyTorch, with the public weights' names.

Every model is called as `model(latents_BCTHW, t_B, ..., drop_B=None)`, with `labels_B` if
`model.condition == "label"` or `prompt_embeds_BLK, prompt_mask_BL` if it is "text".
"""

from longtake.models.build import Model, build_model, build_model_from_config
from longtake.models.config import SIZES, ModelConfig
from longtake.models.init import init_weights

__all__ = [
    "SIZES",
    "Model",
    "ModelConfig",
    "build_model",
    "build_model_from_config",
    "init_weights",
]
