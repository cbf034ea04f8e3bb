"""Configurations of public encoders, to build the same classes with random weights off-line.

Only what differs from the class's defaults is listed. The names are those of the hub; for T5 the
owner is left out because many publish the same model.
"""

from __future__ import annotations

_SD_VAE: dict[str, object] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}
_SDXL_VAE = _SD_VAE | {"sample_size": 1024, "scaling_factor": 0.13025}
_FLUX_VAE = _SD_VAE | {
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# The class's defaults, from which a size of latents is told without building it.
_WAN_VAE: dict[str, object] = {"z_dim": 16, "scale_factor_temporal": 4, "scale_factor_spatial": 8}

# Hub name -> (class, config).
AUTOENCODER_CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "stabilityai/sd-vae-ft-ema": ("AutoencoderKL", _SD_VAE),
    "stabilityai/sd-vae-ft-mse": ("AutoencoderKL", _SD_VAE),
    "stabilityai/sdxl-vae": ("AutoencoderKL", _SDXL_VAE),
    "black-forest-labs/FLUX.1-dev": ("AutoencoderKL", _FLUX_VAE),
    "madebyollin/taesd": ("AutoencoderTiny", {}),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("AutoencoderKLWan", _WAN_VAE),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("AutoencoderKLWan", _WAN_VAE),
    "hunyuanvideo-community/HunyuanVideo": ("AutoencoderKLHunyuanVideo", {}),
    "THUDM/CogVideoX-2b": ("AutoencoderKLCogVideoX", {}),
    "THUDM/CogVideoX-5b": ("AutoencoderKLCogVideoX", {"scaling_factor": 0.7}),
    "Lightricks/LTX-Video": ("AutoencoderKLLTXVideo", {}),
}


def _t5(d_model: int, d_ff: int, num_heads: int, num_layers: int, vocab_size: int) -> dict:
    return {
        "d_model": d_model,
        "d_ff": d_ff,
        "d_kv": 64,
        "num_heads": num_heads,
        "num_layers": num_layers,
        "vocab_size": vocab_size,
        "feed_forward_proj": "gated-gelu",
    }


# Kind -> last part of the hub name -> config.      d_model  d_ff heads layers   vocab
T5_CONFIGS: dict[str, dict[str, dict]] = {
    "t5": {
        "tiny": _t5(64, 128, 2, 2, 512),  # No public model: for tests.
        "t5-v1_1-small": _t5(512, 1024, 6, 8, 32128),
        "t5-v1_1-base": _t5(768, 2048, 12, 12, 32128),
        "t5-v1_1-large": _t5(1024, 2816, 16, 24, 32128),
        "t5-v1_1-xl": _t5(2048, 5120, 32, 24, 32128),
        "t5-v1_1-xxl": _t5(4096, 10240, 64, 24, 32128),
    },
    "umt5": {
        "tiny": _t5(64, 128, 2, 2, 512),
        "umt5-small": _t5(512, 1024, 6, 8, 256384),
        "umt5-base": _t5(768, 2048, 12, 12, 256384),
        "umt5-xl": _t5(2048, 5120, 32, 24, 256384),
        "umt5-xxl": _t5(4096, 10240, 64, 24, 256384),
    },
}
