import json

import pytest
import torch
from safetensors import safe_open

from longtake.models import build_model
from longtake.programs.convert import ConvertConfig, convert, main
from longtake.weights import export_safetensors, load_model, read_weights

SMALL = {"hidden_size": 96, "depth": 2, "num_heads": 3}
TEXT = {"caption_channels": 24, "max_caption_tokens": 6}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def pixart_file(tmp_path):
    """A PixArt checkpoint as its authors save it."""
    model = build_model("pixart", **SMALL, **TEXT, space_scale=0.5)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "PixArt.pth")
    return tmp_path / "PixArt.pth"


def test_pixart_becomes_an_stdit(tmp_path, pixart_file, capsys):
    output, report = tmp_path / "stdit.safetensors", tmp_path / "account.json"
    arguments = [str(pixart_file), "--init-stdit-from-pixart", "--num-heads", "3"]
    arguments += ["--space-scale", "0.5", "--output", str(output), "--report", str(report)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "inside 'state_dict', not read beside them: epoch" in printed
    assert "2D patch weight gains a time dimension" in printed
    counts = json.loads(report.read_text())["counts"]
    assert (counts["new"], counts["reshaped"]) == (8, 1)
    model, _ = load_model(output)
    assert (model.config.name, model.config.space_scale) == ("stdit", 0.5)
    assert not model.blocks[0].attn_temp.proj.weight.any()
    assert model.blocks[0].attn_temp.qkv.weight.any()


def test_file_goes_to_diffusers_and_back(tmp_path):
    source, folder = tmp_path / "dit.safetensors", tmp_path / "folder"
    model = build_model("dit", **SMALL, num_classes=5)
    export_safetensors(model, source)
    config = ConvertConfig(
        source=str(source), output=str(folder), to="diffusers", latent_size=(1, 8, 8)
    )
    assert convert(config) == 0
    assert json.loads((folder / "config.json").read_text())["sample_size"] == 8
    back = tmp_path / "back.safetensors"
    assert convert(ConvertConfig(source=str(folder), output=str(back))) == 0
    assert torch.equal(
        read_weights(back).state["blocks.1.attn.qkv.weight"], model.blocks[1].attn.qkv.weight
    )


def test_positions_and_dtype_of_the_output_can_be_chosen(tmp_path):
    source, output = tmp_path / "latte.safetensors", tmp_path / "out.safetensors"
    export_safetensors(build_model("latte", **SMALL, num_classes=5), source)
    config = ConvertConfig(
        source=str(source), output=str(output), latent_size=(3, 8, 12), dtype="bf16"
    )
    assert convert(config) == 0
    state = read_weights(output).state
    assert state["pos_embed"].shape == (1, 24, 96)
    assert state["temp_embed"].shape == (1, 3, 96)
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    with safe_open(output, framework="pt") as file:
        assert file.metadata()["longtake.made_from"] == "latte.safetensors"


def test_a_latte_without_positions_is_recognized_when_named(tmp_path):
    model = build_model("latte", **SMALL, num_classes=5)
    torch.save(model.state_dict(), tmp_path / "latte.pt")
    output = tmp_path / "latte.safetensors"
    assert (
        convert(ConvertConfig(source=str(tmp_path / "latte.pt"), output=str(output), model="latte"))
        == 0
    )
    assert load_model(output)[0].config.name == "latte"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "stdit"}, "--model stdit was asked for, but the weights are PixArt"),
        ({"init_stdit_from_pixart": True, "to": "diffusers"}, "diffusers has no stdit"),
        ({"wrapper": "ema"}, "no dictionary 'ema' inside; found: state_dict"),
        ({"num_heads": 5}, "num_heads=5 must divide hidden_size=96"),
        ({"to": "diffusers", "output": "{tmp}/x"}, "give sample_size"),
        ({"to": "diffusers", "output": "{tmp}/x", "latent_size": (1, 8, 4)}, "square size"),
    ],
    ids=["model", "stdit", "wrapper", "heads", "size", "square"],
)
def test_failures_are_one_message_and_status_1(tmp_path, pixart_file, capsys, options, message):
    options = {k: v.format(tmp=tmp_path) if k == "output" else v for k, v in options.items()}
    assert convert(ConvertConfig(source=str(pixart_file), **options)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_failed_account_is_still_reported(tmp_path, capsys):
    state = build_model("pixart", **SMALL, **TEXT).state_dict()
    del state["blocks.1.mlp.fc1.bias"]
    torch.save(state, tmp_path / "x.pt")
    report = tmp_path / "account.json"
    assert convert(ConvertConfig(source=str(tmp_path / "x.pt"), report=str(report))) == 1
    assert "missing: blocks.*.mlp.fc1.bias" in capsys.readouterr().err
    assert json.loads(report.read_text())["counts"]["missing"] == 1


def test_existing_files_are_kept(tmp_path, pixart_file, capsys):
    (tmp_path / "out.safetensors").write_bytes(b"precious")
    assert main([str(pixart_file), "--output", str(tmp_path / "out.safetensors")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").read_bytes() == b"precious"
