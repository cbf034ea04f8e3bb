import pytest
import torch

from longtake.pipeline import encode_batch, training_loss
from tests.pipeline.conftest import make_batch


def _encode(sample_ids, video_encoder, text_encoder):
    return encode_batch(
        make_batch(sample_ids),
        video_encoder=video_encoder,
        text_encoder=text_encoder,
        seed=0,
        device=torch.device("cpu"),
    )


def test_loss_of_a_sample_does_not_know_its_neighbours(
    model, objective, video_encoder, text_encoder
):
    def losses(sample_ids):
        inputs = _encode(sample_ids, video_encoder, text_encoder)
        return training_loss(model, objective, inputs, condition_dropout=0.5)

    together = losses([1, 2, 3, 4])
    assert together.dtype == torch.float32
    halves = torch.cat((losses([1, 2]), losses([3, 4])))
    torch.testing.assert_close(halves, together, rtol=1e-5, atol=0)
    assert len(set(together.tolist())) == 4


@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0), (1.0, 64)])
def test_condition_dropout_reaches_the_model(
    objective, video_encoder, text_encoder, share, dropped
):
    seen = {}

    def spy(noisy_BCTHW, network_t_B, **condition):
        seen.update(condition, t=network_t_B)
        return noisy_BCTHW

    inputs = _encode(list(range(64)), video_encoder, text_encoder)
    training_loss(spy, objective, inputs, condition_dropout=share)
    assert int(seen["drop_B"].sum()) == dropped
    assert ((seen["t"] >= 0) & (seen["t"] <= 1000)).all()
    assert len(seen["t"].unique()) == 64


def test_condition_dropout_drops_about_its_share(objective, video_encoder, text_encoder):
    def spy(noisy_BCTHW, network_t_B, *, drop_B, **condition):
        dropped.append(int(drop_B.sum()))
        return noisy_BCTHW

    dropped = []
    inputs = _encode(list(range(200)), video_encoder, text_encoder)
    training_loss(spy, objective, inputs, condition_dropout=0.1)
    assert 8 <= dropped[0] <= 34
