import json

import pytest
import torch
from safetensors.torch import save_file

from longtake.models import ModelConfig, build_model, build_model_from_config
from longtake.weights import (
    LAYOUTS,
    LoadError,
    Status,
    WeightsError,
    WeightsFile,
    load_file,
    load_model,
    load_public,
    stdit_from_pixart,
)

TEXT = {"caption_channels": 24, "max_caption_tokens": 6}
SMALL = {"size": "XL", "hidden_size": 144, "depth": 2, "num_heads": 2}


def build(name, **overrides):
    settings = {"num_classes": 10} if name in ("dit", "latte") else TEXT
    return build_model(name, **{**SMALL, **settings, **overrides})


def fates(account):
    return {source: entry.status for entry in account.entries for source in entry.sources}


@pytest.mark.parametrize("layout", ["dit", "latte", "pixart", "stdit"])
def test_public_files_load_and_every_key_is_accounted_for(public_state, layout):
    state = public_state(layout)
    model = build(layout)
    account = load_public(model, state)
    assert account.layout == layout
    assert account.warnings == ()
    assert fates(account).keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
        assert fates(account)[key] is Status.LOADED
    for key in LAYOUTS[layout].positions:
        assert fates(account)[key] is Status.REBUILT


@pytest.mark.parametrize("layout", ["opensora-dit", "opensora-pixart"])
def test_open_soras_video_models_lose_the_one_frame_of_their_patch(public_state, layout):
    state = public_state(layout)
    model = build(LAYOUTS[layout].model)
    account = load_public(model, state)
    entry = next(e for e in account.entries if e.target == "x_embedder.proj.weight")
    assert entry.status is Status.RESHAPED
    assert "loses its time dimension" in entry.reason
    assert torch.equal(model.x_embedder.proj.weight[:, :, None], state["x_embedder.proj.weight"])
    assert account.counts()["rebuilt buffer"] == 2


def test_micro_conditioned_pixart_loads(public_state):
    account = load_public(
        build("pixart", micro_conditioning=True), public_state("pixart", micro=True)
    )
    assert not account.failures
    assert fates(account)["csize_embedder.mlp.0.weight"] is Status.LOADED


def test_a_latte_file_without_positions_is_told_by_the_model(public_state):
    state = {k: v for k, v in public_state("latte").items() if "embed" not in k.split(".")[0][-5:]}
    assert "temp_embed" not in state
    assert load_public(build("latte"), state).layout == "latte"


def test_values_are_cast_and_the_account_says_so(public_state):
    state = {key: value.half() for key, value in public_state("dit").items()}
    account = load_public(build("dit"), state)
    entry = next(e for e in account.entries if e.target == "blocks.0.mlp.fc1.bias")
    assert entry.dtype == "float16 → float32"
    assert account.warnings == ()  # half-precision position tables are no difference


def test_writer_gets_full_tensors_after_everything_was_checked(public_state):
    written = {}
    model, state = build("dit"), public_state("dit")
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    load_public(model, state, write=lambda target, full: written.update({names[id(target)]: full}))
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(written[key], state[key]) for key in written)


def test_wrong_keys_fail_with_hints_and_leave_the_model_untouched(public_state):
    model, state = build("pixart"), public_state("pixart")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state["blocks.1.attn.qkv.wieght"] = state.pop("blocks.1.attn.qkv.weight")
    state["y_embedder.y_proj.fc1.weight"] = torch.zeros(144, 32)
    state["t_block.1.bias"] = torch.zeros(864, dtype=torch.int64)
    state["lonely"] = torch.zeros(1)
    with pytest.raises(LoadError) as caught:
        load_public(model, state)
    message = str(caught.value)
    assert "missing: blocks.*.attn.qkv.weight: the file has 'blocks.*.attn.qkv.wieght'" in message
    assert "unexpected: blocks.*.attn.qkv.wieght" in message
    assert "144x32 in the file, 144x24 in the model (set by caption_channels)" in message
    assert "t_block.1.bias: not the kind of number" in message
    assert "unexpected: lonely" in message
    counts = caught.value.account.counts()
    assert (counts["missing"], counts["unexpected"], counts["mismatched"]) == (1, 2, 2)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_weights_of_another_model_are_named(public_state):
    with pytest.raises(WeightsError, match=r"are DiT \(Meta\), the model is a pixart"):
        load_public(build("pixart"), public_state("dit"))
    with pytest.raises(WeightsError, match="use stdit_from_pixart"):
        load_public(build("stdit"), public_state("pixart"))
    with pytest.raises(WeightsError, match="layout='nonsense' is unknown: use one of dit, latte"):
        load_public(build("dit"), public_state("dit"), layout="nonsense")


def test_other_positions_than_the_models_are_reported(public_state):
    account = load_public(build("stdit"), public_state("stdit", space_scale=0.5, time_scale=0.75))
    space, time = account.warnings
    assert space.startswith("pos_embed differs by ")
    assert space.endswith("with space_scale=1; the file's first step is that of space_scale=0.5")
    assert time.endswith("with time_scale=1; the file's first step is that of time_scale=0.75")
    matching = build("stdit", space_scale=0.5, time_scale=0.75)
    assert (
        load_public(matching, public_state("stdit", space_scale=0.5, time_scale=0.75)).warnings
        == ()
    )


def test_account_prints_as_table_and_json(public_state):
    account = load_public(build("stdit"), public_state("stdit"))
    table = str(account)
    assert "blocks.*.attn_temp.qkv.weight" in table
    assert "largest difference" in table
    content = json.loads(account.to_json())
    assert content["layout"] == "stdit"
    assert content["counts"] == account.counts()
    assert len(content["entries"]) == len(account.entries)


# -------------------------------------------------------------------------------- STDiT from PixArt


def frames_alone(pixart, latents_BCTHW, t_B, **text):
    frames = [pixart(frame[:, :, None], t_B, **text)[:, :, 0] for frame in latents_BCTHW.unbind(2)]
    return torch.stack(frames, dim=2)


@pytest.mark.parametrize("source", ["pixart", "opensora-pixart"])
def test_stdit_from_pixart_starts_as_pixart_on_every_frame(public_state, source):
    state = public_state(source, space_scale=0.5)
    pixart, stdit = build("pixart", space_scale=0.5), build("stdit", space_scale=0.5)
    load_public(pixart, state)
    with torch.no_grad():  # a temporal branch that would show
        for key, value in stdit.state_dict().items():
            if "attn_temp" in key:
                value.normal_(generator=torch.Generator().manual_seed(1))
    account = stdit_from_pixart(stdit, state)

    generator = torch.Generator().manual_seed(2)
    latents_BCTHW = torch.randn(2, 4, 3, 8, 10, generator=generator)
    text = {
        "prompt_embeds_BLK": torch.randn(2, 6, 24, generator=generator),
        "prompt_mask_BL": torch.tensor([[True] * 6, [True] * 2 + [False] * 4]),
        "drop_B": torch.tensor([True, False]),
    }
    t_B = torch.tensor([10.0, 900.0])
    with torch.no_grad():
        expected = frames_alone(pixart, latents_BCTHW, t_B, **text)
        got = stdit(latents_BCTHW, t_B, **text)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))

    assert account.warnings == ()
    new = [entry for entry in account.entries if entry.status is Status.NEW]
    assert len(new) == 2 * 4
    assert {e.reason for e in new if ".proj." in e.target} == {
        "zero, so that the branch adds nothing at step 0"
    }
    patch = next(e for e in account.entries if e.target == "x_embedder.proj.weight")
    assert patch.status is (Status.RESHAPED if source == "pixart" else Status.LOADED)


def test_stdit_from_pixart_refuses_what_is_not_that(public_state):
    with pytest.raises(WeightsError, match=r"but these are Open-Sora 1\.0 STDiT"):
        stdit_from_pixart(build("stdit"), public_state("stdit"))
    with pytest.raises(WeightsError, match="only a stdit starts unchanged from PixArt"):
        stdit_from_pixart(build("stdit2"), public_state("pixart"))
    with pytest.raises(LoadError, match=r"unexpected: csize_embedder\.mlp\.0\.weight"):
        stdit_from_pixart(build("stdit"), public_state("pixart", micro=True))


# --------------------------------------------------------------------------------------- load_model


def test_a_wrapped_file_becomes_a_model(tmp_path, public_state):
    state = public_state("pixart", space_scale=2.0)
    torch.save({"state_dict": state}, tmp_path / "PixArt.pth")
    model, account = load_model(tmp_path / "PixArt.pth", num_heads=2)
    expected = ModelConfig(name="pixart", **SMALL, **TEXT, space_scale=2.0, base_size=4)
    assert model.config == expected
    assert account.warnings == ()
    out = model(torch.zeros(1, 4, 1, 8, 8), torch.ones(1), prompt_embeds_BLK=torch.zeros(1, 6, 24))
    assert out.shape == (1, 8, 1, 8, 8)

    reference = build_model_from_config(expected)
    load_public(reference, state)
    again = reference(
        torch.zeros(1, 4, 1, 8, 8), torch.ones(1), prompt_embeds_BLK=torch.zeros(1, 6, 24)
    )
    assert torch.equal(out, again)


def test_overrides_and_dtype_are_taken(tmp_path, public_state):
    save_file(public_state("stdit"), tmp_path / "x.safetensors")
    model, account = load_model(tmp_path / "x.safetensors", dtype=torch.bfloat16, space_scale=0.5)
    assert model.config.space_scale == 0.5
    assert model.x_embedder.proj.weight.dtype is torch.bfloat16
    assert "num_heads=2 is assumed" in account.warnings[0]
    assert "pos_embed differs" in account.warnings[1]


def test_sigma_files_without_positions_load_with_a_note(tmp_path, public_state):
    state = public_state("pixart", tokens=30)
    del state["pos_embed"]
    torch.save({"state_dict": state}, tmp_path / "sigma.pth")
    model, account = load_model(tmp_path / "sigma.pth", num_heads=2, space_scale=2.0, base_size=64)
    assert (model.config.max_caption_tokens, model.config.base_size) == (30, 64)
    assert "no spatial position buffer" in account.warnings[0]


def test_headers_that_are_no_config_are_refused(tmp_path, public_state):
    path = tmp_path / "x.safetensors"
    good = {"patch_size": [1, 2, 2], "name": "dit"}
    for header in (
        "{",
        "[]",
        "{}",
        json.dumps({**good, "name": "x"}),
        json.dumps({**good, "a": 1}),
    ):
        save_file(public_state("dit"), path, metadata={"longtake.config": header})
        with pytest.raises(WeightsError, match=r"longtake\.config"):
            load_model(path)


@pytest.mark.parametrize(
    "spoil",
    [torch.Tensor.long, torch.Tensor.flatten, lambda v: v[:0], lambda v: v[..., :1]],
    ids=["integers", "flat", "empty", "narrow"],
)
@pytest.mark.parametrize(
    "key", ["pos_embed", "blocks.1.attn.qkv.weight", "x_embedder.proj.weight", "t_block.1.weight"]
)
def test_spoiled_tensors_are_wrong_weights_not_crashes(public_state, spoil, key):
    state = public_state("pixart")
    state[key] = spoil(state[key])
    with pytest.raises(WeightsError):
        load_file(WeightsFile(state, "spoiled", "torch"))


def test_positions_that_are_no_numbers_are_reported(public_state):
    state = public_state("pixart")
    state["pos_embed"].fill_(float("nan"))
    _, account = load_file(WeightsFile(state, "spoiled", "torch"), num_heads=2)
    assert "pos_embed differs by nan" in account.warnings[-1]


def test_a_stray_block_number_does_not_build_a_deep_model(public_state):
    state = public_state("dit")
    state["blocks.9999.attn.qkv.bias"] = torch.zeros(432)
    with pytest.raises(LoadError, match=r"unexpected: blocks\.\*\.attn\.qkv\.bias"):
        load_file(WeightsFile(state, "deep", "torch"))
