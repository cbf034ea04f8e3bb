"""`longtake sample` on finished runs: which weights, what is asked for, and who may be sampled."""

import json

import pytest
import torch

from longtake.data import read_clip
from longtake.programs.sample import SampleCommand, main, sample
from longtake.training import CheckpointError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _pixels(path, num_frames=4):
    return read_clip(path, num_frames=num_frames).float()


def _frames(paths):
    return [path.read_bytes() for path in paths]


def test_sample_takes_the_newest_checkpoint_and_the_runs_prompts(text_run, capsys):
    assert main([str(text_run)]) == 0
    folder = text_run / "samples/from-step-00000006"
    assert capsys.readouterr().out.split() == [str(folder / "000.mp4"), str(folder / "001.mp4")]
    assert json.loads((folder / "captions.json").read_text()) == {
        "000.mp4": "a square",
        "001.mp4": "two squares",
    }
    # The run itself drew the same at its end, from the same averages.
    at_the_end = text_run / "samples/step-00000006"
    assert _frames([folder / "000.mp4"]) == _frames([at_the_end / "000.mp4"])


def test_sample_takes_an_explicit_checkpoint_and_either_weights(text_run, tmp_path):
    checkpoint = text_run / "checkpoints/step-4"
    outputs = {}
    for weights in ("ema", "raw"):
        command = SampleCommand(
            run=checkpoint, prompt=("a square",), weights=weights, out=tmp_path / weights
        )
        outputs[weights] = sample(command)[0]
    assert outputs["ema"].parent == tmp_path / "ema"
    assert not torch.equal(_pixels(outputs["ema"]), _pixels(outputs["raw"]))
    newest = SampleCommand(run=text_run, prompt=("a square",), out=tmp_path / "newest")
    assert not torch.equal(_pixels(sample(newest)[0]), _pixels(outputs["ema"]))


def test_video_depends_on_seed_place_and_prompt_alone(text_run, tmp_path):
    def first_and_second(name, *prompts, seed=7):
        command = SampleCommand(run=text_run, prompt=prompts, seed=seed, out=tmp_path / name)
        return _frames(sample(command))

    both = first_and_second("both", "a square", "row 2")
    assert first_and_second("again", "a square", "row 2") == both
    assert first_and_second("alone", "a square") == both[:1]
    assert first_and_second("other", "something else", "row 2")[1] == both[1]
    assert first_and_second("seed", "a square", seed=8) != both[:1]


@pytest.mark.parametrize(
    ("size", "suffix"), [((1, 48, 24), ".png"), ((5, 24, 40), ".mp4")], ids=["image", "video"]
)
def test_sample_takes_any_size(text_run, tmp_path, size, suffix):
    num_frames, height, width = size
    command = SampleCommand(
        run=text_run,
        prompt=("a square",),
        num_frames=num_frames,
        height=height,
        width=width,
        out=tmp_path,
        fps=4,
    )
    path = sample(command)[0]
    assert path.suffix == suffix
    assert _pixels(path, num_frames).shape == (num_frames, 3, height, width)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++"])
def test_iddpm_run_takes_its_samplers(label_run, tmp_path, sampler):
    command = SampleCommand(run=label_run, label=(1,), sampler=sampler, steps=3, out=tmp_path)
    assert _pixels(sample(command)[0]).shape[0] == 4
    assert json.loads((tmp_path / "captions.json").read_text()) == {"000.mp4": "label 1"}


def test_flow_run_takes_dpm_solver_without_guidance(text_run, tmp_path):
    command = SampleCommand(
        run=text_run, prompt=("x",), sampler="dpm-solver++", guidance_scale=1.0, out=tmp_path
    )
    assert sample(command)[0].exists()


@pytest.mark.parametrize(
    ("run", "settings", "message"),
    [
        ("text_run", {"label": (1,)}, "conditioned on text: use --prompt"),
        ("label_run", {"prompt": ("x",)}, "conditioned on labels: use --label"),
        ("label_run", {"label": (3,)}, "--label 3 must be from 0 to 2"),
        ("text_run", {"sampler": "ddim"}, "sampler=ddim does not go with objective=flow"),
        ("label_run", {"sampler": "euler"}, "sampler=euler does not go with objective=iddpm"),
        ("text_run", {"steps": 0}, "steps=0 must be at least 1"),
        ("text_run", {"height": 30}, "30"),
        ("text_run", {"num_frames": -2}, "--num-frames -2 must be at least 1"),
        ("text_run", {"fps": 0.0}, "--fps 0.0"),
        ("text_run", {"device": "cuda"}, "PyTorch sees no CUDA device"),
    ],
)
def test_wrong_request_is_refused(request, tmp_path, run, settings, message):
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    folder = request.getfixturevalue(run)
    with pytest.raises(ValueError, match=message):
        sample(SampleCommand(run=folder, out=tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoint_is_passed_over_or_refused(text_run, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(text_run, run)
    damaged = run / "checkpoints/step-6/__0_0.distcp"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    paths = sample(SampleCommand(run=run, prompt=("x",)))
    assert paths[0].parent.name == "from-step-00000004"
    with pytest.raises(CheckpointError, match="is damaged"):
        sample(SampleCommand(run=damaged.parent, prompt=("x",)))


def test_run_with_random_encoders_is_marked_and_must_be_asked_for(random_run, tmp_path):
    record = json.loads((random_run / "run.json").read_text())
    assert record["encoders"]["random"] is True
    assert "mean nothing" in (random_run / "report.html").read_text()
    with pytest.raises(ValueError, match="add --encoder-weights random"):
        sample(SampleCommand(run=random_run))
    with pytest.raises(ValueError, match="add --encoder-weights random"):
        sample(SampleCommand(run=random_run, encoder_weights="pretrained"))
    sample(SampleCommand(run=random_run, encoder_weights="random", out=tmp_path))
    for folder in (tmp_path, random_run / "samples/step-00000001"):
        listing = json.loads((folder / "captions.json").read_text())
        assert listing["000.mp4"] == "a square"
        assert "mean nothing" in listing["warning"]


def test_random_weights_of_encoders_without_weights_mark_nothing(text_run, tmp_path):
    sample(SampleCommand(run=text_run, encoder_weights="random", out=tmp_path))
    assert "warning" not in json.loads((tmp_path / "captions.json").read_text())
