"""DiT and Latte against their formulas, forward and backward."""

import pytest
import torch
from reference_models import assert_same_gradients, label_model, leaves, randomize

from longtake.models import build_model

torch.set_num_threads(1)

SMALL = {"depth": 3, "hidden_size": 24, "num_heads": 3, "num_classes": 5}
SHAPES = {
    "image": (1, 8, 8),
    "non_square_image": (1, 4, 10),
    "odd_image": (1, 5, 7),
    "video": (3, 6, 4),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ["dit", "latte"])
def test_label_model_equals_formula(name, shape):
    model = randomize(build_model(name, "tiny", **SMALL, space_scale=0.5, time_scale=2 / 3))
    latents = torch.randn(2, 4, *shape, dtype=torch.float64)
    t_B = torch.tensor([17.0, 999.0])
    out = model(latents, t_B, labels_B=torch.tensor([3, 0]))
    weights = leaves(model)
    expected = label_model(weights, model.config, latents, t_B, [3, 0])
    assert out.shape == (2, 8, *shape)
    assert_same_gradients(model, out, weights, expected)


def test_dit_without_sigma_predicts_input_channels():
    model = build_model("dit", "tiny", **SMALL, in_channels=6, learn_sigma=False)
    out = model(torch.zeros(1, 6, 1, 4, 4), torch.zeros(1), labels_B=torch.tensor([0]))
    assert out.shape == (1, 6, 1, 4, 4)


@pytest.mark.parametrize("name", ["dit", "latte"])
def test_dropped_label_is_the_null_label(name):
    model = randomize(build_model(name, "tiny", **SMALL))
    latents, t_B = torch.randn(2, 4, 2, 4, 4, dtype=torch.float64), torch.tensor([5.0, 5.0])
    labels_B, drop_B = torch.tensor([1, 2]), torch.tensor([False, True])
    out = model(latents, t_B, labels_B=labels_B, drop_B=drop_B)
    assert torch.equal(out, model(latents, t_B, labels_B=torch.tensor([1, 5])))


def test_latte_frames_meet_only_in_odd_blocks():
    model = randomize(build_model("latte", "tiny", **SMALL | {"depth": 1}))
    latents, t_B = torch.randn(1, 4, 3, 4, 4, dtype=torch.float64), torch.tensor([5.0])
    labels_B = torch.tensor([1])
    frames = [model(latents[:, :, f : f + 1], t_B, labels_B=labels_B) for f in range(3)]
    torch.testing.assert_close(model(latents, t_B, labels_B=labels_B), torch.cat(frames, dim=2))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 3, 1, 8, 8)], ids=["no_frames", "channels"])
def test_latents_of_another_shape_are_refused(shape):
    model = build_model("dit", "tiny", **SMALL)
    with pytest.raises(ValueError, match=r"latents have shape .* must be \(batch, 4 channels, fr"):
        model(torch.zeros(shape), torch.zeros(1), labels_B=torch.zeros(1, dtype=torch.int64))


def test_frame_by_frame_model_refuses_patches_in_time():
    with pytest.raises(ValueError, match=r"patch_size=\(2, 2, 2\) joins 2 frames.*use \(1, 2, 2\)"):
        build_model("dit", "tiny", patch_size=(2, 2, 2))
