"""Runs and their checkpoints as the source of `longtake convert`."""

import pytest
import torch

from longtake.config import RunConfig, load_yaml
from longtake.models import build_model_from_config
from longtake.programs.convert import main
from longtake.training import load_weights_for_inference
from longtake.weights import load_model

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("what", ["run", "checkpoint"])
def test_converted_run_computes_what_its_averaged_weights_do(text_run, tmp_path, capsys, what):
    checkpoint = text_run / "checkpoints/step-6"
    output = tmp_path / "model.safetensors"
    source = text_run if what == "run" else checkpoint
    assert main([str(source), "--output", str(output)]) == 0
    assert str(checkpoint) in capsys.readouterr().out

    config = load_yaml(text_run / "config.yaml", RunConfig)
    averaged = build_model_from_config(config.model)
    load_weights_for_inference(checkpoint, averaged)
    converted, _ = load_model(output)
    assert converted.config == config.model
    latents_BCTHW = torch.randn(2, 24, 4, 4, 6)
    embeds_BLK = torch.randn(2, 8, 16)
    mask_BL = torch.ones(2, 8, dtype=torch.bool)
    t_B = torch.tensor([3.0, 800.0])
    with torch.no_grad():
        expected, found = (
            model(latents_BCTHW, t_B, prompt_embeds_BLK=embeds_BLK, prompt_mask_BL=mask_BL)
            for model in (averaged.eval(), converted.eval())
        )
    assert expected.abs().max() > 0
    assert torch.equal(found, expected)

    load_weights_for_inference(checkpoint, averaged, ema=False)
    weight = "final_layer.linear.weight"
    assert not torch.equal(averaged.state_dict()[weight], converted.state_dict()[weight])


def test_run_with_random_encoders_is_converted_only_when_asked(random_run, tmp_path, capsys):
    output = tmp_path / "model.safetensors"
    assert main([str(random_run), "--output", str(output)]) == 1
    assert "add --allow-random-encoders" in capsys.readouterr().err
    assert not output.exists()
    assert main([str(random_run), "--output", str(output), "--allow-random-encoders"]) == 0
    assert output.exists()


def test_folder_of_a_run_without_checkpoints_is_not_one(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
