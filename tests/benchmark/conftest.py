"""One real measurement of a tiny model, and records made up for what only looks at records."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longtake.benchmark.measure import StepOptions, measure_step
from longtake.benchmark.records import (
    MachineReport,
    Measurement,
    Protocol,
    timing,
)
from longtake.benchmark.rows import Row, rows, tiny
from longtake.encoders import TextEncoderConfig, VideoEncoderConfig
from longtake.parallel import ParallelConfig, build_mesh, start_distributed, stop_distributed
from longtake.planning import Ceilings

QUICK = Protocol(warmup=1, steps=2)
CEILINGS = Ceilings(
    matmul_flops=800e12,
    linear_flops=700e12,
    copy_bytes=4e12,
    attention_flops=((256, 170e12), (1024, 280e12)),
)


def row(key: str) -> Row:
    return next(row for row in rows("all") if row.key == key)


def tiny_row(key: str) -> Row:
    return tiny(row(key))


def real_encoders(config, folder, **train):
    """The configuration with tiny encoders of the real classes, T5 and AutoencoderKL, random."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    ).save_config(folder)
    return replace(
        config,
        model=replace(config.model, in_channels=4, caption_channels=64),
        text_encoder=TextEncoderConfig(kind="t5", path="tiny", weights="random", max_tokens=24),
        video_encoder=VideoEncoderConfig(kind="diffusers", path=str(folder), weights="random"),
        train=replace(config.train, **train),
    )


def measurement(step_ms: float = 100.0, *, micro_batch: int = 8, **changes) -> Measurement:
    """As of STDiT 16x256, with steps that spread by 2 %."""
    made = Measurement(
        model="stdit-XL/2",
        setting="16x256x256",
        encoders="absent",
        num_devices=1,
        micro_batch=micro_batch,
        latents=(4, 16, 32, 32),
        tokens_per_sample=4096,
        parameters=759_620_768,
        timing=timing(
            [step_ms * 0.99, step_ms, step_ms * 1.01], warmup_steps=5, first_step_seconds=9.0
        ),
        samples_per_second=1000 * micro_batch / step_ms,
        tokens_per_second=4096 * 1000 * micro_batch / step_ms,
        model_tflops=300.0,
        mfu=0.303,
        peak_allocated_gib=70.0,
        peak_reserved_gib=75.0,
        precision="bf16",
        compiled=True,
        checkpointing="none",
        kernels={"spatial": "cudnn", "temporal": "triton"},
        first_loss=1.0,
        last_loss=0.9,
    )
    return replace(made, **changes)


def machine() -> MachineReport:
    environment = {
        "started": "2026-11-23T00:00:00Z",
        "command": ["longtake", "bench", "table", "video"],
        "python": "3.12",
        "packages": {"torch": "2.11.0"},
        "device": {"type": "cuda", "name": "NVIDIA H200"},
        "gpu": {"power.limit": "700 W"},
        "commit": "abc",
    }
    return MachineReport(environment=environment, ceilings=CEILINGS)


@pytest.fixture(scope="session")
def mesh():
    threads = torch.get_num_threads()
    # Steps this small are no faster on more, and tests run side by side.
    torch.set_num_threads(1)
    yield build_mesh(ParallelConfig(), start_distributed())
    stop_distributed()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def measured(mesh):
    """A real step of a tiny STDiT, its encoders on-line."""
    chosen = tiny_row("stdit-16x256-on-line")
    options = StepOptions(protocol=QUICK, encoders="on-line", micro_batch=2)
    return measure_step(chosen.config, mesh, options)
