import dataclasses

import pytest

from longtake.diffusion import (
    IDDPM,
    DiffusionConfig,
    RectifiedFlow,
    SamplerConfig,
    build_objective,
    build_sampler,
)

SIZE = {"num_frames": 4, "height": 256, "width": 256}


def test_objectives_say_what_the_model_must_output():
    assert isinstance(build_objective(DiffusionConfig()), IDDPM)
    assert build_objective(DiffusionConfig()).learn_sigma
    flow = build_objective(DiffusionConfig(objective="flow", shift=3.0))
    assert isinstance(flow, RectifiedFlow)
    assert not flow.learn_sigma


def test_every_flow_setting_reaches_the_objective():
    config = DiffusionConfig(
        objective="flow",
        timesteps="logit-normal",
        logit_mean=0.1,
        logit_std=0.9,
        shift=2.0,
        shift_by_resolution=True,
    )
    settings = dataclasses.asdict(config)
    assert settings.pop("objective") == "flow"
    assert vars(build_objective(config)) == settings


@pytest.mark.parametrize(
    "setting",
    [
        {"timesteps": "logit-normal"},
        {"logit_mean": 0.5},
        {"logit_std": 2.0},
        {"shift": 3.0},
        {"shift_by_resolution": True},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_flow_settings_are_refused_by_iddpm(setting):
    [(name, value)] = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value} has no effect with objective=iddpm"):
        build_objective(DiffusionConfig(**setting))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shift": 0.0}, "shift=0.0 must be positive"),
        ({"timesteps": "logit-normal", "logit_std": -1.0}, "logit_std=-1.0 must be positive"),
    ],
)
def test_flow_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        build_objective(DiffusionConfig(objective="flow", **setting))


@pytest.mark.parametrize(
    ("objective", "sampler", "message"),
    [
        ("iddpm", "euler", "sampler=euler does not go with objective=iddpm: use ddpm, ddim or dpm"),
        ("flow", "ddpm", "sampler=ddpm does not go with objective=flow: use euler or dpm-solver"),
        ("flow", "ddim", "sampler=ddim does not go with objective=flow"),
    ],
)
def test_wrong_pairs_name_the_right_ones(objective, sampler, message):
    built = build_objective(DiffusionConfig(objective=objective))
    with pytest.raises(ValueError, match=message):
        build_sampler(SamplerConfig(name=sampler), built, **SIZE)


@pytest.mark.parametrize(
    ("sampler", "steps", "message"),
    [
        ("ddpm", 0, "steps=0 must be at least 1"),
        ("ddim", 1001, "steps=1001 must be between 1 and the 1000"),
        ("dpm-solver++", 1000, "steps=1000 must be below the 1000"),
    ],
)
def test_impossible_numbers_of_steps_are_refused(sampler, steps, message):
    with pytest.raises(ValueError, match=message):
        build_sampler(SamplerConfig(name=sampler, steps=steps), IDDPM(), **SIZE)


def test_the_default_sampler_goes_with_either_objective():
    for objective in (IDDPM(), RectifiedFlow()):
        build_sampler(SamplerConfig(), objective, **SIZE)
