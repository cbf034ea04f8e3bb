"""Named runs: functions whose docstrings say what is trained, on what, and how to start it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from longtake.config.run import RunConfig, SamplingConfig, TrainConfig, ValidationConfig
from longtake.data import Bucket, DataConfig
from longtake.diffusion import DiffusionConfig, SamplerConfig
from longtake.encoders import TextEncoderConfig, VideoEncoderConfig
from longtake.models import ModelConfig
from longtake.parallel import ParallelConfig
from longtake.training import CheckpointConfig, EmaConfig, OptimizerConfig, ScheduleConfig

# Where the quickstart keeps the clips it trains on.
QUICKSTART_CLIPS = "data/quickstart"

_SD_VAE = VideoEncoderConfig(kind="diffusers", path="stabilityai/sd-vae-ft-ema")
_T5 = TextEncoderConfig(kind="t5", path="DeepFloyd/t5-v1_1-xxl", max_tokens=120)
# Open-Sora 1.0 trained its video models with a constant rate and without warm-up or weight decay.
_VIDEO_OPTIMIZER = OptimizerConfig(lr=2e-5)


def quickstart() -> RunConfig:
    """A tiny STDiT on three real clips: learns in minutes on two CPU cores.

    `make quickstart`, or `longtake train --preset quickstart`.
    """
    return RunConfig(
        name="quickstart",
        model=ModelConfig(
            name="stdit2",
            size="tiny",
            in_channels=16,
            learn_sigma=False,
            caption_channels=64,
            max_caption_tokens=24,
        ),
        # A clip this small shows what it is under much noise already: train more at high t, where
        # that is decided.
        diffusion=DiffusionConfig(objective="flow", timesteps="logit-normal", logit_mean=0.5),
        data=DataConfig(
            manifest=f"{QUICKSTART_CLIPS}/train.jsonl",
            buckets=(Bucket(num_frames=8, height=64, width=96, batch_size=8),),
            frame_interval=2,
            num_workers=0,
        ),
        # Few channels: at high noise a token copies its 2x2x16 noise values through 128 channels.
        video_encoder=VideoEncoderConfig(
            kind="dct", dct_luma_channels=10, dct_chroma_channels=3, dct_whitening=0.3
        ),
        text_encoder=TextEncoderConfig(kind="hashed-words", channels=64, max_tokens=24),
        train=TrainConfig(steps=800),
        optimizer=OptimizerConfig(lr=4e-3, betas=(0.9, 0.99)),
        schedule=ScheduleConfig(warmup_steps=50),
        ema=EmaConfig(decay=0.99),
        validation=ValidationConfig(manifest=f"{QUICKSTART_CLIPS}/heldout.jsonl", every_steps=100),
        sampling=SamplingConfig(
            prompts=(
                "A big grey cartoon rabbit stretches its arms on a green meadow",
                "A man in a dark suit and a red bow tie talks in the back of a car",
                "Cars drive along a street of brick houses behind a green metal fence",
                "A man in a red bow tie tilts his head and talks in the back of a car",
            ),
            sampler=SamplerConfig(name="euler", steps=30, guidance_scale=1.3),
            frames_per_second=8.0,  # slower than life: eight frames would be over at once
        ),
        checkpoint=CheckpointConfig(every_steps=400, keep_last=2),
    )


def dit_xl2_256() -> RunConfig:
    r"""DiT-XL/2 on 256² images with class labels.

    One H200 makes 701 images/s without encoders. On fewer than two GPUs of 80 GB add
    --train.accumulation 2.

    torchrun --nproc-per-node 8 -m longtake train --preset dit-xl2-256 \
        --data.manifest images.csv
    """
    return RunConfig(
        name="dit-xl2-256",
        model=ModelConfig(name="dit", size="XL"),
        data=DataConfig(
            manifest="images.csv",
            buckets=(Bucket(num_frames=1, height=256, width=256, batch_size=256),),
            flip=True,
            num_workers=8,
        ),
        video_encoder=_SD_VAE,
        text_encoder=TextEncoderConfig(kind="none"),
        train=TrainConfig(steps=400_000),
        optimizer=OptimizerConfig(lr=1e-4),
        sampling=SamplingConfig(
            every_steps=10_000,
            labels=(207, 360, 387, 974),
            sampler=SamplerConfig(guidance_scale=4.0, guidance_channels=3),
        ),
        checkpoint=CheckpointConfig(every_steps=5000),
    )


def stdit_xl2_16x256() -> RunConfig:
    r"""STDiT-XL/2 on 16 frames of 256², Open-Sora 1.0's first stage.

    One H200 makes 29 clips/s without encoders. A GPU of 80 GB holds 8 clips: with fewer than 8 of
    them add --train.accumulation.

    torchrun --nproc-per-node 8 -m longtake train --preset stdit-xl2-16x256 \
        --data.manifest clips.csv
    """
    return _video(
        "stdit-xl2-16x256",
        ModelConfig(name="stdit", size="XL", space_scale=0.5),
        Bucket(num_frames=16, height=256, width=256, batch_size=64),
        frame_interval=3,
    )


def stdit_xl2_16x512() -> RunConfig:
    r"""STDiT-XL/2 on 16 frames of 512², Open-Sora 1.0's second stage; starts from 16x256 weights.

    One H200 makes 6.6 clips/s without encoders, with FlashAttention-4. A GPU of 80 GB holds 2
    clips: with fewer than 16 of them add --train.accumulation.

    torchrun --nproc-per-node 8 -m longtake train --preset stdit-xl2-16x512 \
        --data.manifest clips.csv
    """
    return _video(
        "stdit-xl2-16x512",
        ModelConfig(name="stdit", size="XL", space_scale=1.0),
        Bucket(num_frames=16, height=512, width=512, batch_size=32),
        frame_interval=3,
    )


def stdit_xl2_64x512() -> RunConfig:
    r"""STDiT-XL/2 on 64 frames of 512², 65,536 tokens a clip; recomputes every block.

    A GPU of 141 GB holds a clip without that: add --parallel.checkpointing none for 1.66 clips/s on
    one H200, without encoders, with FlashAttention-4.

    torchrun --nproc-per-node 8 -m longtake train --preset stdit-xl2-64x512 \
        --data.manifest clips.csv
    """
    config = _video(
        "stdit-xl2-64x512",
        ModelConfig(name="stdit", size="XL", space_scale=1.0, time_scale=2 / 3),
        Bucket(num_frames=64, height=512, width=512, batch_size=16),
        frame_interval=2,
    )
    return replace(config, parallel=ParallelConfig(checkpointing="full"))


def stdit_xl2_360x512() -> RunConfig:
    r"""STDiT-XL/2 on 360 frames of 512², 368,640 tokens a clip; recomputes every block.

    Add --parallel.sp 2 for two GPUs to share a clip; then a GPU of 141 GB holds 11 blocks without
    recomputing them, --parallel.kept-blocks 11: 0.19 clips/s a GPU on two H200s, without encoders.
    --parallel.checkpointing nested where memory runs short. Starts from 64x512 weights.

    torchrun --nproc-per-node 8 -m longtake train --preset stdit-xl2-360x512 \
        --data.manifest clips.csv
    """
    config = _video(
        "stdit-xl2-360x512",
        ModelConfig(name="stdit", size="XL", space_scale=1.0, time_scale=2 / 3),
        Bucket(num_frames=360, height=512, width=512, batch_size=8),
        frame_interval=1,
    )
    return replace(config, parallel=ParallelConfig(checkpointing="full"))


def stdit_xl2_1min_1080p() -> RunConfig:
    r"""STDiT-XL/2 on one minute of 1080p at 24 fps, 2.94 million tokens a clip.

    Wan's autoencoder makes 360 latent frames of the 1437. The GPUs share the one clip of a step's
    micro-batch: --parallel.sp is their number. Blocks are computed again, their branches once more
    in pieces, and what blocks keep waits in host memory: 180 GB of it for all GPUs together, less
    6.8 for each of --parallel.kept-inputs, of which one H200 has room for 11. Train from a latent
    store: a minute of 1080p is 9 GB of pixels.

    torchrun --nproc-per-node 8 -m longtake train --preset stdit-xl2-1min-1080p \
        --data.manifest clips.csv --parallel.sp 8
    """
    config = _video(
        "stdit-xl2-1min-1080p",
        ModelConfig(name="stdit", size="XL", in_channels=16, space_scale=1.0, time_scale=1.0),
        Bucket(num_frames=1437, height=1080, width=1920, batch_size=1),
        frame_interval=1,
    )
    return replace(
        config,
        video_encoder=VideoEncoderConfig(
            kind="diffusers",
            class_name="AutoencoderKLWan",
            path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        ),
        sampling=SamplingConfig(),
        parallel=ParallelConfig(checkpointing="nested", offload=True),
    )


def pixart_xl2_16x256() -> RunConfig:
    r"""PixArt-XL/2 with attention over all 4,096 tokens of 16x256: STDiT's plain rival.

    torchrun --nproc-per-node 8 -m longtake train --preset pixart-xl2-16x256 \
        --data.manifest clips.csv
    """
    return _video(
        "pixart-xl2-16x256",
        ModelConfig(name="pixart", size="XL", space_scale=0.5),
        Bucket(num_frames=16, height=256, width=256, batch_size=64),
        frame_interval=3,
    )


def _video(name: str, model: ModelConfig, bucket: Bucket, *, frame_interval: int) -> RunConfig:
    return RunConfig(
        name=name,
        model=model,
        data=DataConfig(
            manifest="clips.csv",
            buckets=(bucket,),
            frame_interval=frame_interval,
            flip=True,
            num_workers=8,
        ),
        video_encoder=_SD_VAE,
        text_encoder=_T5,
        optimizer=_VIDEO_OPTIMIZER,
        sampling=SamplingConfig(
            every_steps=2000,
            prompts=("A car drives along a coast road", "Waves break on a rocky shore at sunset"),
            sampler=SamplerConfig(guidance_scale=7.0, guidance_channels=3),
        ),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "quickstart": quickstart,
    "dit-xl2-256": dit_xl2_256,
    "stdit-xl2-16x256": stdit_xl2_16x256,
    "stdit-xl2-16x512": stdit_xl2_16x512,
    "stdit-xl2-64x512": stdit_xl2_64x512,
    "stdit-xl2-360x512": stdit_xl2_360x512,
    "stdit-xl2-1min-1080p": stdit_xl2_1min_1080p,
    "pixart-xl2-16x256": pixart_xl2_16x256,
}


def preset(name: str) -> RunConfig:
    """The preset of that name. Raises: ValueError naming the nearest one, or all."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(PRESETS)}"
        raise ValueError(f"unknown preset {name!r}: {hint}")
    return PRESETS[name]()
