"""The training step on a GPU: it computes what the CPU computes, and never waits for the device."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.data import Batch
from longtake.diffusion import DiffusionConfig, build_objective
from longtake.encoders import (
    TextEncoderConfig,
    VideoEncoderConfig,
    build_text_encoder,
    build_video_encoder,
)
from longtake.models import ModelConfig, build_model_from_config, init_weights
from longtake.parallel import (
    ParallelConfig,
    build_mesh,
    materialize,
    parallelize,
    start_distributed,
    stop_distributed,
    sync_gradients,
    write_full,
)
from longtake.pipeline import encode_batch, training_loss
from longtake.training import (
    Ema,
    EmaConfig,
    OptimizerConfig,
    SkippedUpdates,
    build_optimizer,
    update_weights,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TEXT = TextEncoderConfig(kind="t5", path="tiny", weights="random", max_tokens=16)


def _batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    size = (4, 3, 4, 32, 32)
    return Batch(
        pixels_BCTHW=torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
        captions=["a cat", "two dogs run", "", "rain"],
        labels_B=torch.full((4,), -1),
        epochs_B=torch.zeros(4, dtype=torch.int64),
        sample_ids_B=torch.arange(4) + 4 * step,
        weights_B=torch.ones(4),
        bucket=0,
    ).pin_memory()


@pytest.fixture
def vae_folder(tmp_path: Path) -> str:
    from diffusers import AutoencoderKL

    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (32, 32),
    }
    AutoencoderKL(**blocks, latent_channels=4).save_config(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("objective_name", ["iddpm", "flow"])
def test_step_never_waits_for_the_device(objective_name: str, vae_folder: str):
    device = start_distributed("cuda")
    try:
        config = ParallelConfig(compile=False)
        mesh = build_mesh(config, device)
        video_encoder = build_video_encoder(
            VideoEncoderConfig(kind="diffusers", path=vae_folder, weights="random"), device
        )
        text_encoder = build_text_encoder(TEXT, device)
        assert text_encoder is not None
        objective = build_objective(DiffusionConfig(objective=objective_name))
        model_config = ModelConfig(
            name="stdit",
            size="tiny",
            in_channels=video_encoder.latent_channels,
            learn_sigma=objective.learn_sigma,
            caption_channels=text_encoder.channels,
            max_caption_tokens=text_encoder.max_tokens,
        )
        with torch.device("meta"):
            model = build_model_from_config(model_config)
        parallelize(model, mesh, config)
        materialize(model, device)
        init_weights(model, seed=0, write=write_full)
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3))
        ema = Ema(model, EmaConfig())
        skipped = SkippedUpdates(device)

        def step(number: int) -> Tensor:
            sync_gradients(model, is_last=True)
            inputs = encode_batch(
                _batch(number),
                video_encoder=video_encoder,
                text_encoder=text_encoder,
                seed=0,
                device=device,
            )
            loss = training_loss(model, objective, inputs, condition_dropout=0.1).mean()
            loss.backward()
            _, applied = update_weights(model, optimizer, ema, clip_norm=1.0, lr=1e-3, step=number)
            skipped.add(applied)
            return loss.detach()

        losses = [step(0), step(1)]  # tables move to the device and memory is allocated
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses += [step(2), step(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.stack(losses).isfinite().all()
        assert skipped.state_dict() == {"total": 0, "in_a_row": 0}
    finally:
        stop_distributed()


@pytest.mark.parametrize("name", ["dit", "pixart", "stdit", "stdit2", "latte"])
def test_model_on_gpu_equals_cpu(name: str):
    torch.manual_seed(0)
    config = ModelConfig(name=name, size="tiny", caption_channels=64, max_caption_tokens=16)
    model = build_model_from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    latents_BCTHW, t_B = torch.randn(2, 4, 3, 6, 10), torch.tensor([3.0, 998.0])
    if model.condition == "label":
        condition = {"labels_B": torch.tensor([1, 7])}
    else:
        mask_BL = torch.arange(16) < torch.tensor([[16], [5]])
        condition = {"prompt_embeds_BLK": torch.randn(2, 16, 64), "prompt_mask_BL": mask_BL}

    def run(device: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        copy = build_model_from_config(config)
        copy.load_state_dict(model.state_dict())
        copy.to(device, dtype)
        moved = {key: value.to(device) for key, value in condition.items()}
        out = copy(latents_BCTHW.to(device), t_B.to(device), **moved)
        out.float().square().mean().backward()
        gradients = [p.grad.float().cpu() for p in copy.parameters() if p.grad is not None]
        return out.detach().float().cpu(), gradients

    expected, expected_gradients = run("cpu", torch.float32)
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 5e-2)):
        out, gradients = run("cuda", dtype)
        assert (out - expected).norm() <= tolerance * expected.norm()
        squared = sum(
            (g - e).square().sum() for g, e in zip(gradients, expected_gradients, strict=True)
        )
        assert (
            squared.sqrt() <= tolerance * sum(e.square().sum() for e in expected_gradients).sqrt()
        )
