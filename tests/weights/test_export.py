import json

import pytest
import torch
from safetensors import safe_open

from longtake.models import build_model
from longtake.weights import (
    WeightsError,
    export_diffusers,
    export_safetensors,
    load_model,
    read_weights,
    use_original_timesteps,
    with_positions,
)

TEXT = {"caption_channels": 24, "max_caption_tokens": 6}
SMALL = {"hidden_size": 144, "depth": 2, "num_heads": 2}


def random_model(name, **overrides):
    settings = {"num_classes": 10} if name in ("dit", "latte") else TEXT
    model = build_model(name, **{**SMALL, **settings, **overrides})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def assert_same_state(model, expected):
    got, wanted = model.state_dict(), expected.state_dict()
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key


def assert_close(got, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * scale)


# ------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("name", ["dit", "pixart", "stdit", "stdit2", "latte"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 10**6], ids=["one file", "shards"])
def test_what_is_written_is_read_back(tmp_path, name, max_shard_bytes):
    model = random_model(name, space_scale=0.5)
    files = export_safetensors(
        model,
        tmp_path / "m.safetensors",
        metadata={"provenance": "test"},
        max_shard_bytes=max_shard_bytes,
    )
    assert (len(files) == 1) == (max_shard_bytes == 10**9)
    assert all(file.stat().st_size < 1.1 * max_shard_bytes for file in files)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in files}
    loaded, account = load_model(files[-1])
    assert loaded.config == model.config
    assert account.counts().keys() == {"loaded"}
    assert_same_state(loaded, model)
    with safe_open(files[0], framework="pt") as file:
        header = file.metadata()
    assert (header["format"], header["provenance"]) == ("pt", "test")
    assert json.loads(header["longtake.config"])["name"] == name


def test_dtype_is_converted_and_files_are_not_overwritten(tmp_path):
    path = tmp_path / "m.safetensors"
    export_safetensors(random_model("dit"), path, dtype=torch.bfloat16)
    assert {value.dtype for value in read_weights(path).state.values()} == {torch.bfloat16}
    with pytest.raises(WeightsError, match="exists already"):
        export_safetensors(random_model("dit"), path)
    export_safetensors(random_model("dit"), path, overwrite=True)
    with pytest.raises(WeightsError, match=r"must end in \.safetensors"):
        export_safetensors(random_model("dit"), tmp_path / "m.pt")


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(Exception, match="metadata"):
        export_safetensors(random_model("dit"), tmp_path / "m.safetensors", metadata={"a": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["dit", "pixart", "stdit", "latte"])
def test_public_layout_with_positions_has_the_public_keys(public_shapes, layout):
    model = random_model(layout)
    text = {} if layout in ("dit", "latte") else {"K": 24, "tokens": 6}
    state = with_positions(model.state_dict(), model.config, (3, 4, 4))
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes == public_shapes(layout, 144, 2, side=4, frames=3, **text)


# --------------------------------------------------------------------------------------- diffusers


def outputs_of_pixart(ours, theirs, height, width, *, micro):
    generator = torch.Generator().manual_seed(1)
    latents_BCHW = torch.randn(2, 4, height, width, generator=generator)
    t_B = torch.tensor([3.0, 712.0])
    embeds_BLK = torch.randn(2, 6, 24, generator=generator)
    mask_BL = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    size_B2, ratio_B = torch.tensor([[64.0, 64.0], [72.0, 96.0]]), torch.tensor([1.0, 0.75])
    sizes = {"image_size_B2": size_B2, "aspect_ratio_B": ratio_B} if micro else {}
    added = {
        "resolution": size_B2 if micro else None,
        "aspect_ratio": ratio_B[:, None] if micro else None,
    }
    with torch.no_grad():
        out_BCHW = ours(
            latents_BCHW[:, :, None],
            t_B,
            prompt_embeds_BLK=embeds_BLK,
            prompt_mask_BL=mask_BL,
            **sizes,
        )[:, :, 0]
        expected_BCHW = theirs(
            latents_BCHW,
            encoder_hidden_states=embeds_BLK,
            timestep=t_B,
            added_cond_kwargs=added,
            encoder_attention_mask=mask_BL,
            return_dict=False,
        )[0]
    return out_BCHW, expected_BCHW


@pytest.mark.parametrize("micro", [False, True], ids=["plain", "1024-MS"])
def test_diffusers_pixart_gives_the_same_output_and_comes_back(tmp_path, micro):
    diffusers = pytest.importorskip("diffusers")
    model = random_model("pixart", micro_conditioning=micro, space_scale=2.0, base_size=4)
    export_diffusers(model, tmp_path)
    theirs = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path).eval()
    for height, width in [(8, 8), (8, 12), (16, 4)]:
        assert_close(*outputs_of_pixart(model, theirs, height, width, micro=micro))

    back, account = load_model(tmp_path)
    assert_same_state(back, model)  # the null caption, too
    assert back.config.dimensions == model.config.dimensions
    assert (back.config.space_scale, back.config.base_size) == (2.0, 4)
    assert account.warnings == ()


def test_pixart_without_base_size_needs_one_and_matches_there(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = random_model("pixart", space_scale=0.5)
    with pytest.raises(WeightsError, match="give sample_size"):
        export_diffusers(model, tmp_path)
    export_diffusers(model, tmp_path, sample_size=12)
    theirs = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path).eval()
    assert_close(*outputs_of_pixart(model, theirs, 12, 12, micro=False))


def test_pixart_saved_by_diffusers_is_read(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        num_layers=2,
        cross_attention_dim=96,
        sample_size=16,
        caption_channels=24,
    ).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, account = load_model(tmp_path, max_caption_tokens=6)
    assert ours.config.dimensions == (2, 96, 3)
    for height, width in [(16, 16), (8, 20)]:
        assert_close(*outputs_of_pixart(ours, theirs, height, width, micro=False))
    (null,) = [entry for entry in account.entries if entry.status == "new"]
    assert null.target == "y_embedder.y_embedding"
    assert null.reason.endswith("it encodes the empty prompt: zeros are put there")


def outputs_of_dit(ours, theirs, t_B, side=8):
    latents_BCHW = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(1))
    labels_B = torch.tensor([3, 10])  # a class and the null label
    with torch.no_grad():
        out_BCHW = ours(latents_BCHW[:, :, None], t_B, labels_B=labels_B)[:, :, 0]
        expected = theirs(latents_BCHW, timestep=t_B, class_labels=labels_B, return_dict=False)
    return out_BCHW, expected[0]


def test_diffusers_dit_gives_the_same_output_and_comes_back(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = random_model("dit")
    export_diffusers(model, tmp_path, sample_size=8)
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    assert_close(*outputs_of_dit(model, theirs, torch.zeros(2)))
    # At other timesteps diffusers' own frequencies show, and nothing else does.
    t_B = torch.tensor([250.0, 999.0])
    got, expected = outputs_of_dit(model, theirs, t_B)
    assert not torch.allclose(got, expected, rtol=1e-3, atol=1e-3)
    use_original_timesteps(theirs)
    assert_close(*outputs_of_dit(model, theirs, t_B))

    back, account = load_model(tmp_path)
    assert_same_state(back, model)
    assert "127" in account.warnings[0]
    assert_close(*outputs_of_dit(back, theirs, t_B, side=12))  # stretched as diffusers does


def test_dit_whose_blocks_embed_differently_is_refused(tmp_path):
    model = random_model("dit")
    export_diffusers(model, tmp_path, sample_size=8)
    file = read_weights(tmp_path)
    key = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    state = {**file.state, key: file.state[key] + 1}
    export_safetensors(state, tmp_path / "diffusion_pytorch_model.safetensors", overwrite=True)
    with pytest.raises(WeightsError, match=r"transformer_blocks\.1\..*differs from"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("latte", {}, "no class-conditional Latte"),
        ("stdit", {}, "diffusers has no stdit: export to safetensors"),
        ("dit", {"mlp_ratio": 2.0}, "mlp_ratio=2: diffusers' is always 4"),
        ("dit", {"space_scale": 0.5}, "no scale for its positions, but here it is 0.5"),
        ("pixart", {"patch_size": (1, 2, 4)}, "needs one frame and a square"),
    ],
    ids=["latte", "stdit", "mlp", "scale", "patch"],
)
def test_what_diffusers_cannot_express_is_refused(tmp_path, name, overrides, message):
    with pytest.raises(WeightsError, match=message):
        export_diffusers(random_model(name, **overrides), tmp_path / "out", sample_size=8)
    assert not (tmp_path / "out").exists()


def test_exported_folder_is_not_overwritten(tmp_path):
    model = random_model("dit")
    export_diffusers(model, tmp_path, sample_size=8)
    with pytest.raises(WeightsError, match="already holds a config"):
        export_diffusers(model, tmp_path, sample_size=8)
