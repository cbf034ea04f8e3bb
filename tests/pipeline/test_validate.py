import torch

from longtake.pipeline import encode_batch, validation_loss
from tests.pipeline.conftest import make_batch


def _held_out(batches, video_encoder, text_encoder):
    return [
        encode_batch(
            batch,
            video_encoder=video_encoder,
            text_encoder=text_encoder,
            seed=0,
            device=torch.device("cpu"),
        )
        for batch in batches
    ]


def test_padding_weighs_nothing_and_batching_does_not_matter(
    model, objective, video_encoder, text_encoder
):
    def sums(*batches):
        held_out = _held_out(batches, video_encoder, text_encoder)
        return validation_loss(model, objective, held_out, num_timesteps=3)

    whole = sums(make_batch([1, 2, 3]))
    assert whole.shape == (3, 2)
    assert whole[:, 1].tolist() == [3, 3, 3]
    parts = sums(make_batch([1, 2]), make_batch([3, 9], weights=[1.0, 0.0]))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)
    assert torch.equal(sums(make_batch([1, 2, 3])), whole)
    assert not torch.allclose(sums(make_batch([1, 2, 9])), whole)


def test_validation_leaves_no_gradient(model, objective, video_encoder, text_encoder):
    held_out = _held_out([make_batch([1])], video_encoder, text_encoder)
    assert not validation_loss(model, objective, held_out, num_timesteps=2).requires_grad
