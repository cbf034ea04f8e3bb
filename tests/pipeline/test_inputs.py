import pytest
import torch

from longtake.encoders import LatentStats
from longtake.pipeline import encode_batch
from tests.pipeline.conftest import make_batch

CPU = torch.device("cpu")


class _Noisy:
    """An encoder with a posterior: zero mean, unit variance."""

    def encode(self, pixels_BCTHW):
        mean = torch.zeros(len(pixels_BCTHW), 4, 2, 2, 3)
        return LatentStats(mean, torch.zeros_like(mean))

    def finish(self, stats, noise_BCTHW=None):
        return stats.mean_BCTHW + noise_BCTHW


def test_text_becomes_embeddings_and_labels_stay_out(video_encoder, text_encoder):
    inputs = encode_batch(
        make_batch([3, 4]),
        video_encoder=video_encoder,
        text_encoder=text_encoder,
        seed=0,
        device=CPU,
    )
    assert inputs.clean_BCTHW.shape == (2, *video_encoder.latent_shape(2, 16, 24))
    assert inputs.condition.keys() == {"prompt_embeds_BLK", "prompt_mask_BL"}
    assert inputs.condition["prompt_embeds_BLK"].shape == (2, 6, 16)
    assert inputs.pixel_size == (16, 24)


def test_without_text_encoder_the_condition_is_the_labels(video_encoder):
    inputs = encode_batch(
        make_batch([3, 7]), video_encoder=video_encoder, text_encoder=None, seed=0, device=CPU
    )
    assert inputs.condition.keys() == {"labels_B"}
    assert inputs.condition["labels_B"].tolist() == [3, 2]


def test_sizes_are_pixels_and_height_over_width(video_encoder):
    inputs = encode_batch(
        make_batch([0, 1]),
        video_encoder=video_encoder,
        text_encoder=None,
        seed=0,
        device=CPU,
        with_sizes=True,
    )
    assert inputs.condition["image_size_B2"].tolist() == [[16, 24]] * 2
    assert inputs.condition["aspect_ratio_B"].tolist() == pytest.approx([2 / 3] * 2)


def test_posterior_noise_belongs_to_the_sample():
    def latents(sample_ids, seed=0):
        inputs = encode_batch(
            make_batch(sample_ids), video_encoder=_Noisy(), text_encoder=None, seed=seed, device=CPU
        )
        return inputs.clean_BCTHW

    together = latents([5, 6, 7])
    assert torch.equal(latents([6])[0], together[1])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(latents([6], seed=1)[0], together[1])
