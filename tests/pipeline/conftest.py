from __future__ import annotations

import pytest
import torch

from longtake.data import Batch
from longtake.diffusion import DiffusionConfig, build_objective
from longtake.encoders.dct import DctEncoder
from longtake.encoders.hashed_words import HashedWordsEncoder
from longtake.models import build_model, init_weights

TEXT = {"caption_channels": 16, "max_caption_tokens": 6}
SMALL = {"depth": 1, "hidden_size": 48, "num_heads": 2, "in_channels": 24, "learn_sigma": False}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def video_encoder():
    return DctEncoder()


@pytest.fixture
def text_encoder():
    return HashedWordsEncoder(channels=16, max_tokens=6)


@pytest.fixture
def objective():
    return build_objective(DiffusionConfig(objective="flow"))


@pytest.fixture(scope="session")
def model():
    """A text model whose output is not zero, as that of a fresh one is."""
    model = build_model("stdit", "tiny", **SMALL, **TEXT)
    return awake(model)


def awake(model):
    """The model with every weight moved away from zero."""
    init_weights(model, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn(param.shape, generator=generator)
    return model.eval()


def make_batch(sample_ids, *, weights=None):
    """Pixels, captions and labels that the sample ids decide."""
    pixels = [
        torch.randint(
            0, 256, (3, 2, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(k)
        )
        for k in sample_ids
    ]
    return Batch(
        pixels_BCTHW=torch.stack(pixels),
        captions=[f"caption number {k}" for k in sample_ids],
        labels_B=torch.tensor([k % 5 for k in sample_ids]),
        epochs_B=torch.zeros(len(sample_ids), dtype=torch.int64),
        sample_ids_B=torch.tensor(sample_ids),
        weights_B=torch.ones(len(sample_ids)) if weights is None else torch.tensor(weights),
        bucket=0,
    )
