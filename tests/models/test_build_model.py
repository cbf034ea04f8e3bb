import pytest
import torch

from longtake.models import SIZES, ModelConfig, build_model, build_model_from_config

torch.set_num_threads(1)

ERRORS = {
    "heads": ({"num_heads": 5}, "num_heads=5 must divide hidden_size=128"),
    "hidden": ({"hidden_size": 66, "num_heads": 3}, "hidden_size=66 must be divisible by 4"),
    "rotary": (
        {"name": "stdit2", "hidden_size": 36, "num_heads": 4},
        r"hidden_size / num_heads = 9 must be even",
    ),
    "micro_kind": ({"micro_conditioning": True}, "pixart only, not for stdit"),
    "micro_size": (
        {"name": "pixart", "micro_conditioning": True},
        "hidden_size=128 must be divisible by 3",
    ),
    "base_size": ({"base_size": 0}, "base_size=0 must be at least 1"),
    "space_scale": ({"space_scale": 0.0}, "space_scale=0.0 must be positive"),
    "time_scale": ({"time_scale": -1.0}, "time_scale=-1.0 must be positive"),
}


@pytest.mark.parametrize(("overrides", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_sizes_are_explained(overrides, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_model(**{"name": "stdit", "size": "tiny"} | overrides)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'stdit3' does not exist: use one of dit, pixart, stdit"):
        build_model("stdit3", "tiny")  # pyright: ignore[reportArgumentType]


def test_overrides_win_over_the_size():
    config = ModelConfig(size="S", depth=2, num_heads=4)
    assert config.dimensions == (2, SIZES["S"].hidden_size, 4)
    assert ModelConfig(in_channels=16).out_channels == 32
    assert ModelConfig(in_channels=16, learn_sigma=False).out_channels == 16


def test_same_config_gives_the_same_model_whatever_the_global_random_state():
    config = ModelConfig(name="dit", size="tiny", num_classes=3)
    first = build_model_from_config(config).state_dict()
    torch.manual_seed(99)
    second = build_model_from_config(config).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["dit", "pixart", "stdit", "stdit2", "latte"])
def test_meta_model_runs_on_shapes_alone(name):
    with torch.device("meta"):
        model = build_model(name)
        text = {"prompt_embeds_BLK": torch.empty(2, 9, 4096), "drop_B": torch.ones(2).bool()}
        labels = {"labels_B": torch.zeros(2, dtype=torch.int64)}
        condition = labels if model.condition == "label" else text
        out = model(torch.empty(2, 4, 16, 33, 60), torch.empty(2), **condition)
    assert out.shape == (2, 8, 16, 33, 60)
    assert out.is_meta
