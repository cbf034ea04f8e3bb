import pytest
import torch

from longtake.diffusion import guided

NOISY = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([999.0, 12.0])


class LabelModel:
    """Answers with 100 * label + channel plus its input, label -1 standing for no condition."""

    def __init__(self, channels=8):
        self.channels = channels
        self.calls = []

    def __call__(self, noisy, network_t, *, labels_B, drop_B=None):
        self.calls.append((noisy, network_t, labels_B, drop_B))
        if drop_B is not None:
            labels_B = torch.where(drop_B, -1, labels_B)
        channel = torch.arange(self.channels).view(1, -1, 1, 1, 1)
        repeated = noisy.repeat(1, self.channels // noisy.shape[1], 1, 1, 1)
        return repeated + 100.0 * labels_B.view(-1, 1, 1, 1, 1) + channel


def answer(labels, channels=8):
    return LabelModel(channels)(NOISY, TIMES, labels_B=torch.tensor(labels))


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0, 7.5])
def test_all_latent_channels_are_guided_and_the_variance_is_conditional(scale):
    model = LabelModel()
    condition = {"labels_B": torch.tensor([1, 5])}
    predict = guided(model, condition, guidance_scale=scale, latent_channels=4)
    output = predict(NOISY, TIMES)
    conditional, without = answer([1, 5]), answer([-1, -1])
    expected = without + scale * (conditional - without)
    torch.testing.assert_close(output[:, :4], expected[:, :4])
    assert torch.equal(output[:, 4:], conditional[:, 4:])


def test_one_call_of_twice_the_batch_tells_the_halves_apart():
    model = LabelModel()
    condition = {"labels_B": torch.tensor([1, 5])}
    guided(model, condition, guidance_scale=4.0, latent_channels=4)(NOISY, TIMES)
    [(noisy, network_t, labels, drop)] = model.calls
    assert torch.equal(noisy, torch.cat((NOISY, NOISY)))
    assert network_t.tolist() == [999, 12, 999, 12]
    assert labels.tolist() == [1, 5, 1, 5]
    assert drop.tolist() == [False, False, True, True]


def test_three_channels_reproduce_the_original_arithmetic():
    """As DiT's sampling: eps is the first three channels, all else stays each half's own."""
    predict = guided(
        LabelModel(),
        {"labels_B": torch.tensor([1, 5])},
        guidance_scale=4.0,
        latent_channels=4,
        channels=3,
    )
    both = torch.cat((answer([1, 5]), answer([-1, -1])))
    eps, rest = both[:, :3], both[:, 3:]
    conditional, without = eps.split(2)
    half = without + 4.0 * (conditional - without)
    original = torch.cat((torch.cat((half, half)), rest), dim=1)[:2]
    torch.testing.assert_close(predict(NOISY, TIMES), original)


def test_a_model_without_variance_is_guided_too():
    predict = guided(
        LabelModel(4), {"labels_B": torch.tensor([1, 5])}, guidance_scale=2.0, latent_channels=4
    )
    conditional, without = answer([1, 5], 4), answer([-1, -1], 4)
    torch.testing.assert_close(predict(NOISY, TIMES), 2 * conditional - without)


def test_scale_one_runs_the_condition_alone():
    model = LabelModel()
    condition = {"labels_B": torch.tensor([1, 5])}
    output = guided(model, condition, guidance_scale=1.0, latent_channels=4)(NOISY, TIMES)
    assert torch.equal(output, answer([1, 5]))
    [(noisy, _, _, drop)] = model.calls
    assert len(noisy) == 2
    assert drop is None


def test_guidance_is_computed_in_float32():
    def model(noisy, network_t, *, drop_B):
        return (
            torch.where(drop_B.view(-1, 1, 1, 1, 1), 1.0, 1.0078125)
            .expand(4, 4, 1, 3, 3)
            .bfloat16()
        )

    output = guided(model, {}, guidance_scale=7.3, latent_channels=4)(NOISY, TIMES)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, torch.full_like(output, 1 + 7.3 * 0.0078125))


@pytest.mark.parametrize("channels", [0, 5, -1])
def test_impossible_channels_are_named(channels):
    with pytest.raises(
        ValueError, match=f"guidance_channels={channels} must be between 1 and the 4"
    ):
        guided(LabelModel(), {}, guidance_scale=4.0, latent_channels=4, channels=channels)
