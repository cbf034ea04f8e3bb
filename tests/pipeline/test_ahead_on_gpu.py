"""Encoding ahead with real encoder classes: the numbers of the serial path, without a wait.

On a GPU two streams share memory here, so a wrong order shows as wrong numbers; on a CPU the same
steps run in the host's order.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from longtake.data import Batch
from longtake.diffusion import DiffusionConfig, build_objective
from longtake.encoders import TextEncoderConfig, VideoEncoderConfig
from longtake.models import ModelConfig, build_model_from_config, init_weights
from longtake.parallel import (
    Mesh,
    ParallelConfig,
    build_mesh,
    materialize,
    parallelize,
    start_distributed,
    stop_distributed,
    write_full,
)
from longtake.pipeline import Trainee, build_encoders, encode_batch, in_turn, training_step
from longtake.training import Ema, EmaConfig, OptimizerConfig, build_optimizer

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

VAE = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [32, 32],
    "latent_channels": 4,
}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
CAPTIONS = ["a cat", "two dogs run along the river", "", "rain", "a cat", "one two three four five"]


@dataclass(frozen=True)
class _Steps:
    """Steps on clips that their number decides."""

    mesh: Mesh
    folder: Path
    num_steps: int
    compiled: bool

    def train(self, *, ahead: bool) -> list[float]:
        device, is_cuda = self.mesh.device, self.mesh.device.type == "cuda"
        video, text = build_encoders(
            VideoEncoderConfig(
                kind="diffusers", path=str(self.folder), weights="random", compile=self.compiled
            ),
            TextEncoderConfig(
                kind="t5", path="tiny", weights="random", max_tokens=32, compile=self.compiled
            ),
            self.mesh,
            0,
        )
        objective = build_objective(DiffusionConfig(objective="flow"))
        parallel = ParallelConfig(compile=False)
        with torch.device("meta"):
            model = build_model_from_config(
                ModelConfig(
                    name="stdit",
                    size="tiny",
                    in_channels=4,
                    learn_sigma=False,
                    caption_channels=64,
                    max_caption_tokens=32,
                )
            )
        parallelize(model, self.mesh, parallel)
        materialize(model, device)
        init_weights(model, seed=0, write=write_full)
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3))
        trainee = Trainee(
            model=model, objective=objective, optimizer=optimizer, ema=Ema(model, EmaConfig())
        )
        encode = partial(
            encode_batch, video_encoder=video, text_encoder=text, seed=0, device=device
        )
        batches = [_batch(number, is_pinned=is_cuda) for number in range(self.num_steps)]
        losses = []
        for step, inputs in enumerate(in_turn(encode, batches, device=device, ahead=ahead)):
            if step == self.num_steps - 4 and is_cuda:
                # All shapes have been compiled, all tables are on the device.
                torch.cuda.set_sync_debug_mode("error")
            result = training_step(
                trainee,
                [inputs],
                num_micro_batches=1,
                condition_dropout=0.1,
                clip_norm=1.0,
                lr=1e-3,
                step=step,
            )
            losses.append(result.loss)
        if is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        return torch.stack(losses).tolist()


def _batch(number: int, *, is_pinned: bool) -> Batch:
    generator = torch.Generator().manual_seed(number)
    frames, side = (4, 64) if number % 2 else (2, 32)
    pixels = (4, 3, frames, side, side)
    batch = Batch(
        pixels_BCTHW=torch.randint(0, 256, pixels, dtype=torch.uint8, generator=generator),
        captions=[CAPTIONS[(number + k) % len(CAPTIONS)] for k in range(4)],
        labels_B=torch.full((4,), -1),
        epochs_B=torch.zeros(4, dtype=torch.int64),
        sample_ids_B=torch.arange(4) + 4 * number,
        weights_B=torch.ones(4),
        bucket=number % 2,
    )
    return batch.pin_memory() if is_pinned else batch


@pytest.mark.parametrize("device", DEVICES)
def test_overlapped_losses_are_the_serial_ones(device, tmp_path):
    is_cuda = device == "cuda"
    (tmp_path / "config.json").write_text(json.dumps(VAE))
    mesh = build_mesh(ParallelConfig(), start_distributed(device))
    try:
        steps = _Steps(mesh, tmp_path, num_steps=40 if is_cuda else 6, compiled=is_cuda)
        serial = steps.train(ahead=False)
        overlapped = steps.train(ahead=True)
    finally:
        if is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        stop_distributed()
    assert all(map(torch.isfinite, torch.tensor(serial)))
    # Sums by atomic additions may come in another order on a GPU; a race is orders above.
    tolerance = 1e-3 if is_cuda else 0.0
    assert overlapped == pytest.approx(serial, rel=tolerance, abs=tolerance)
