"""PixArt, STDiT and STDiT2 against their formulas, forward and backward."""

import pytest
import torch
from reference_models import assert_same_gradients, leaves, randomize, text_model

from longtake.models import build_model

torch.set_num_threads(1)

SMALL = {
    "depth": 2,
    "hidden_size": 24,
    "num_heads": 3,
    "caption_channels": 10,
    "max_caption_tokens": 6,
}
SHAPES = {
    "image": (1, 8, 8),
    "non_square_image": (1, 4, 10),
    "video": (3, 6, 4),
    "odd_video": (2, 5, 7),
}


def small_model(name, **overrides):
    return randomize(build_model(name, "tiny", **SMALL | overrides))


def random_inputs(shape, batch_size=2, tokens=6):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(batch_size, 4, *shape, generator=generator, dtype=torch.float64)
    embeds = torch.randn(batch_size, tokens, 10, generator=generator, dtype=torch.float64)
    return latents, torch.linspace(3.0, 999.0, batch_size), embeds


def first_tokens(lengths, tokens=6):
    return torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ["pixart", "stdit", "stdit2"])
def test_text_model_equals_formula(name, shape):
    model = small_model(name, space_scale=0.5, time_scale=2 / 3)
    latents, t_B, embeds = random_inputs(shape, batch_size=3)
    lengths = [6, 2, 0]
    out = model(latents, t_B, prompt_embeds_BLK=embeds, prompt_mask_BL=first_tokens(lengths))
    weights = leaves(model)
    captions = [embeds[b, :n] for b, n in enumerate(lengths)]
    expected = text_model(weights, model.config, latents, t_B, captions)
    assert out.shape == (3, 8, *shape)
    assert_same_gradients(model, out, weights, expected)


@pytest.mark.parametrize("name", ["stdit", "stdit2"])
def test_patches_in_time_equal_formula(name):
    model = small_model(name, patch_size=(2, 2, 2))
    latents, t_B, embeds = random_inputs((3, 4, 6))
    out = model(latents, t_B, prompt_embeds_BLK=embeds)
    weights = leaves(model)
    expected = text_model(weights, model.config, latents, t_B, list(embeds))
    assert_same_gradients(model, out, weights, expected)


def test_micro_conditioning_equals_formula():
    model = small_model("pixart", micro_conditioning=True, base_size=4, space_scale=2.0)
    latents, t_B, embeds = random_inputs((1, 4, 10))
    sizes = [(512.0, 1280.0, 0.4), (1024.0, 1024.0, 1.0)]
    out = model(
        latents,
        t_B,
        prompt_embeds_BLK=embeds,
        image_size_B2=torch.tensor(sizes)[:, :2],
        aspect_ratio_B=torch.tensor(sizes)[:, 2],
    )
    weights = leaves(model)
    expected = text_model(weights, model.config, latents, t_B, list(embeds), sizes)
    assert_same_gradients(model, out, weights, expected)


def test_micro_conditioning_asks_for_sizes():
    model = small_model("pixart", micro_conditioning=True)
    latents, t_B, embeds = random_inputs((1, 4, 4))
    with pytest.raises(ValueError, match=r"pass image_size_B2 .* and aspect_ratio_B"):
        model(latents, t_B, prompt_embeds_BLK=embeds)


@pytest.mark.parametrize("name", ["pixart", "stdit", "stdit2"])
def test_masked_tokens_and_padding_do_not_matter(name):
    model = small_model(name)
    latents, t_B, embeds = random_inputs((2, 4, 4))
    mask = first_tokens([4, 3])
    out = model(latents, t_B, prompt_embeds_BLK=embeds, prompt_mask_BL=mask)
    other = torch.where(mask[..., None], embeds, 100 * torch.randn_like(embeds))
    same = model(latents, t_B, prompt_embeds_BLK=other, prompt_mask_BL=mask)
    shorter = model(latents, t_B, prompt_embeds_BLK=embeds[:, :4], prompt_mask_BL=mask[:, :4])
    torch.testing.assert_close(same, out)
    torch.testing.assert_close(shorter, out)


@pytest.mark.parametrize("name", ["pixart", "stdit", "stdit2"])
def test_dropped_caption_is_the_null_caption_under_the_same_mask(name):
    model = small_model(name)
    latents, t_B, embeds = random_inputs((2, 4, 4))
    mask, drop_B = first_tokens([5, 2]), torch.tensor([False, True])
    out = model(latents, t_B, prompt_embeds_BLK=embeds, prompt_mask_BL=mask, drop_B=drop_B)
    null = torch.stack([embeds[0], model.y_embedder.y_embedding])
    expected = model(latents, t_B, prompt_embeds_BLK=null, prompt_mask_BL=mask)
    torch.testing.assert_close(out, expected)


def test_dropping_a_caption_longer_than_the_null_caption_is_an_error():
    model = small_model("stdit")
    latents, t_B, embeds = random_inputs((1, 4, 4), tokens=7)
    model(latents, t_B, prompt_embeds_BLK=embeds)
    with pytest.raises(ValueError, match=r"has 7 tokens.*max_caption_tokens=6"):
        model(latents, t_B, prompt_embeds_BLK=embeds, drop_B=torch.tensor([True, False]))


@pytest.mark.parametrize("name", ["pixart", "stdit", "stdit2"])
def test_empty_captions_give_finite_outputs_and_gradients(name):
    model = small_model(name).float()
    latents, t_B, embeds = random_inputs((2, 4, 4))
    mask = torch.zeros(2, 6, dtype=torch.bool)
    out = model(latents.float(), t_B, prompt_embeds_BLK=embeds, prompt_mask_BL=mask)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_stdit_at_first_is_pixart_per_frame():
    pixart, stdit = build_model("pixart", "tiny", **SMALL), build_model("stdit", "tiny", **SMALL)
    randomize(pixart)
    stdit.double()
    shared = {
        name: value.unsqueeze(2) if name == "x_embedder.proj.weight" else value
        for name, value in pixart.state_dict().items()
    }
    missing, unexpected = stdit.load_state_dict(shared, strict=False)
    assert all(".attn_temp." in name for name in missing)
    assert not unexpected
    latents, t_B, embeds = random_inputs((3, 4, 6))
    mask = first_tokens([6, 2])
    text = {"prompt_embeds_BLK": embeds, "prompt_mask_BL": mask}
    frames = [pixart(latents[:, :, f : f + 1], t_B, **text) for f in range(3)]
    torch.testing.assert_close(stdit(latents, t_B, **text), torch.cat(frames, dim=2))


def test_stdit2_tells_frames_apart_in_every_block():
    attend = small_model("stdit2").blocks[1].attn_temp.attend
    qkv_BTSD = torch.randn(1, 5, 2, 3 * 24, dtype=torch.float64)
    swap = [1, 0, 2, 3, 4]
    assert not torch.allclose(attend(qkv_BTSD[:, swap]), attend(qkv_BTSD)[:, swap])


@pytest.mark.parametrize("name", ["dit", "pixart", "stdit", "stdit2", "latte"])
def test_half_precision_weights_stay_close_to_float32(name):
    model = build_model(name, "tiny", caption_channels=10, max_caption_tokens=6, num_classes=5)
    randomize(model).float()
    latents, t_B, embeds = random_inputs((2, 6, 6))
    latents, mask = latents.float(), first_tokens([6, 3])
    condition = {"prompt_embeds_BLK": embeds, "prompt_mask_BL": mask}
    if model.condition == "label":
        condition = {"labels_B": torch.tensor([1, 2])}
    out = model(latents, t_B, **condition)
    half = model.bfloat16()(latents, t_B, **condition)
    assert half.dtype == torch.float32
    error = (half - out).norm() / out.norm()
    assert error < 0.03, f"bfloat16 is off by {error:.3f}"
