import pytest
import yaml

from longtake.config import PRESETS, RunConfig, dump_yaml, from_plain, parse_train
from longtake.models import build_model_from_config


@pytest.mark.parametrize("name", PRESETS)
def test_preset_resolves_and_its_dump_is_the_same_config(name):
    command = parse_train(["--preset", name, "--dry-run", "--train.steps", "3"])
    assert command.dry_run
    assert not command.fresh
    assert command.config.name == name
    assert command.config.train.steps == 3
    printed = yaml.safe_load(dump_yaml(command.config))
    assert from_plain(printed, RunConfig, source="printed") == command.config


@pytest.mark.parametrize("name", PRESETS)
def test_preset_says_how_to_start_it_and_its_model_can_be_built(name):
    import torch

    assert f"--preset {name}" in (PRESETS[name].__doc__ or "")
    with torch.device("meta"):
        model = build_model_from_config(PRESETS[name]().model)
    assert (model.condition == "label") == (PRESETS[name]().text_encoder.kind == "none")


def test_overrides_reach_every_kind_of_field():
    config = parse_train(
        [
            *("--preset", "quickstart"),
            *("--data.buckets.0.height", "48"),
            *("--optimizer.betas", "0.8", "0.9"),
            *("--data.flip", "True"),
            *("--model.depth", "2"),
            *("--data.fps", "12.5"),
            *("--sampling.prompts", "a b", "c"),
            *("--optimizer.clip-norm", "None"),
            *("--video-encoder.kind", "diffusers"),
        ]
    ).config
    assert config.data.buckets[0].height == 48
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.data.flip is True
    assert config.model.depth == 2
    assert config.data.fps == 12.5
    assert config.sampling.prompts == ("a b", "c")
    assert config.optimizer.clip_norm is None
    assert config.video_encoder.kind == "diffusers"


def test_random_encoder_weights_count_only_where_there_are_weights():
    quickstart = parse_train(["--preset", "quickstart", "--encoder-weights", "random"]).config
    assert not quickstart.uses_random_encoders
    video = parse_train(["--preset", "dit-xl2-256", "--encoder-weights", "random"]).config
    assert video.uses_random_encoders
    text = parse_train(["--preset", "quickstart", "--text-encoder.kind", "t5"]).config
    assert not text.uses_random_encoders


def test_help_lists_presets_and_keys(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_train(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for text in ("quickstart", "stdit-xl2-64x512", "--dry-run", "--train.steps"):
        assert text in out


def test_set_is_another_spelling_of_an_override():
    arguments = ["--preset", "quickstart", "--set", "model.depth=2", "--set", "optimizer.lr=1e-3"]
    config = parse_train(arguments).config
    assert (config.model.depth, config.optimizer.lr) == (2, 1e-3)
    with pytest.raises(ValueError, match=r"--set model\.depth: expected key=value"):
        parse_train(["--set", "model.depth"])
