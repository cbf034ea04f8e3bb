from dataclasses import replace

import pytest

from longtake.config import PRESETS, RunConfig, changes
from longtake.config.resume import _MAY_CHANGE, flatten
from longtake.data import Bucket

CONFIG = PRESETS["quickstart"]()


def test_equal_configs_have_no_changes():
    assert changes(CONFIG, PRESETS["quickstart"]()) == []


def test_allowed_changes_are_told():
    after = replace(CONFIG, train=replace(CONFIG.train, steps=900), output="elsewhere")
    assert changes(CONFIG, after) == [
        "output: runs → elsewhere",
        f"train.steps: {CONFIG.train.steps} → 900",
    ]


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("model", "depth", 7),
        ("data", "manifest", "other.csv"),
        ("data", "flip", True),
        ("diffusion", "shift", 2.0),
        ("video_encoder", "dct_block", 4),
        ("text_encoder", "max_tokens", 5),
        ("train", "condition_dropout", 0.5),
        ("ema", "decay", 0.5),
    ],
)
def test_change_that_makes_another_run_is_refused_by_name(part, field, value):
    after = replace(CONFIG, **{part: replace(getattr(CONFIG, part), **{field: value})})
    with pytest.raises(ValueError, match=rf"{part}\.{field}: .* → {value}") as caught:
        changes(CONFIG, after)
    assert "--fresh" in str(caught.value)


def test_another_bucket_is_refused():
    data = replace(CONFIG.data, buckets=(*CONFIG.data.buckets, Bucket(num_frames=1)))
    with pytest.raises(ValueError, match=r"data\.buckets\.1\.num_frames: None → 1"):
        changes(CONFIG, replace(CONFIG, data=data))


def test_allowed_names_exist():
    keys = flatten(RunConfig())
    for name in _MAY_CHANGE:
        assert any(key == name or key.startswith(f"{name}.") for key in keys), name
