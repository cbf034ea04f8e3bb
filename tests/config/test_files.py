import pytest
import yaml

from longtake.config import RunConfig, dump_yaml, from_plain, load_yaml, to_plain


def _with(path, value):
    """The defaults as plain values, one of them changed."""
    values = to_plain(RunConfig())
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["modle"], {}, "unknown key modle: did you mean model?"),
        (["model", "depht"], 3, "unknown key model.depht: did you mean depth?"),
        (["xyzzy"], 3, "unknown key xyzzy: known keys: name, output, seed"),
        (["data", "buckets", 0, "heigth"], 3, "data.buckets[0].heigth: did you mean height?"),
        (["model", "name"], "stditt", "model.name: 'stditt' is not one of dit, pixart, stdit"),
        (["data", "buckets", 0, "height"], "x", "data.buckets[0].height: expected int, got 'x'"),
        (["train", "steps"], 2.5, "train.steps: expected int, got 2.5"),
        (["train", "steps"], True, "train.steps: expected int, got True"),
        (["train", "steps"], 0, "train.steps=0 must be at least 1"),
        (["optimizer", "lr"], "fast", "optimizer.lr: expected float, got 'fast'"),
        (["optimizer", "betas"], [0.9], "optimizer.betas: Not enough values"),
        (["optimizer", "lr"], -1, "optimizer.lr=-1.0 must be at least 0"),
        (["optimizer", "betas"], [0.9, 1.0], "optimizer.betas=(0.9, 1.0) must be in [0, 1)"),
        (["optimizer", "clip_norm"], 0.0, "optimizer.clip_norm=0.0 must be above 0"),
        (["schedule", "shape"], "cos", "schedule.shape: 'cos' is not one of constant, cosine"),
        (["schedule", "warmup_steps"], -1, "schedule.warmup_steps=-1 must be at least 0"),
        (["schedule", "final_factor"], 2.0, "schedule.final_factor=2.0 must be in [0, 1]"),
        (["ema", "decay"], 1.0, "ema.decay=1.0 must be in [0, 1)"),
        (["checkpoint", "every_steps"], 0, "checkpoint.every_steps=0 must be at least 1"),
        (["validation", "every_steps"], 0, "validation.every_steps=0 must be at least 1"),
        (["sampling", "every_steps"], -1, "sampling.every_steps=-1 must be at least 0"),
        (["sampling", "frames_per_second"], 0.0, "frames_per_second=0.0 must be above 0"),
        (["train", "condition_dropout"], 1.0, "train.condition_dropout=1.0 must be in [0, 1)"),
        (["name"], "a/b", "name='a/b' must not be a path"),
        (["name"], "", "name='' must be the name of a folder"),
        (["model"], None, "model: expected keys below it"),
        (["data", "buckets"], 5, "data.buckets: expected keys below it, or a list"),
        (["parallel", "compile"], "yes", "parallel.compile: expected bool, got 'yes'"),
        (["sampling", "sampler", "guidance_channels"], "three", "expected int, got 'three'"),
    ],
)
def test_mistake_in_a_file_is_named_with_its_place(tmp_path, path, value, message):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(_with(path, value)))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        load_yaml(file, RunConfig)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_all_mistakes_are_told_at_once():
    values = _with(["train", "steps"], "x")
    values["optimizer"]["learning_rate"] = 1
    with pytest.raises(ValueError, match=r"train\.steps") as caught:
        from_plain(values, RunConfig, source="run.yaml")
    assert "unknown key optimizer.learning_rate" in str(caught.value)


def test_numbers_are_read_as_people_write_them():
    values = _with(["optimizer", "lr"], yaml.safe_load("1e-4"))
    assert isinstance(values["optimizer"]["lr"], str)  # YAML 1.1 wants 1.0e-4
    values["sampling"]["frames_per_second"] = 12
    config = from_plain(values, RunConfig, source="run.yaml")
    assert config.optimizer.lr == 1e-4
    assert type(config.sampling.frames_per_second) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must be a mapping of keys, got list"),
        ("a: [\n", "is not YAML"),
        ("train: {steps: 3}\nseed: 1\ntrain: {steps: 4}\n", "key 'train' is given twice"),
        ("train: {steps: 3, steps: 4}\n", "key 'steps' is given twice"),
        ("a: !!python/object:os.system {}\n", "is not YAML"),
    ],
)
def test_file_that_is_no_config_is_refused(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_yaml(file, RunConfig)


def test_keys_left_out_keep_their_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("")
    assert load_yaml(file, RunConfig) == RunConfig()
    file.write_text("train: {steps: 3}\n")
    assert load_yaml(file, RunConfig).train.steps == 3


def test_dumped_config_loads_back(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(RunConfig(name="große Wellen 🌊")), encoding="utf-8")
    assert load_yaml(file, RunConfig) == RunConfig(name="große Wellen 🌊")
