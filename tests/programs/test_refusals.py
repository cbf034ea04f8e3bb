"""What cannot work is refused before anything is trained: one message, no traceback, status 2."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from longtake import cli
from tests.processes import run_in_processes
from tests.programs.runs import (
    _run,
    labelled,
    longtake,
    longtake_in,
    run_folder,
    save_config,
    tiny_config,
    write_manifest,
)

TEXT, LABELS = "text", "labels"

# kind of run, overrides, what the message must say
REFUSALS = {
    "no manifest": (TEXT, ["--data.manifest", ""], "data.manifest is not set"),
    "missing manifest": (TEXT, ["--data.manifest", "no.csv"], "no.csv"),
    "unknown format": (TEXT, ["--data.manifest", "x.txt"], "must end in one of .csv"),
    "empty manifest": (TEXT, ["--data.manifest", "{empty}"], "is empty"),
    "no usable sample": (
        TEXT,
        ["--data.manifest", "{images}"],
        "suits bucket 4x32x32: 1 an image",
    ),
    "batch does not divide": (
        TEXT,
        ["--train.accumulation", "3"],
        "batch_size=4 does not divide into 1 processes x 3 micro-batches: use 3 or 6",
    ),
    "token groups": (
        TEXT,
        ["--parallel.sp", "2"],
        "sp=2 must divide the 1 processes: use one of 1, or start a multiple of 2 processes",
    ),
    "channels": (TEXT, ["--model.in-channels", "4"], "set model.in_channels=24"),
    "variance": (TEXT, ["--model.learn-sigma", "True"], "set model.learn_sigma=False"),
    "caption width": (TEXT, ["--model.caption-channels", "24"], "8 tokens of 16 channels"),
    "caption length": (TEXT, ["--model.max-caption-tokens", "9"], "max_caption_tokens=9"),
    "no text encoder": (TEXT, ["--text-encoder.kind", "none"], "set text_encoder.kind to t5"),
    "no captions": (TEXT, ["--data.manifest", "{uncaptioned}"], "has no captions"),
    "held out without captions": (
        TEXT,
        ["--validation.manifest", "{uncaptioned}"],
        "has no captions",
    ),
    "sampler": (TEXT, ["--sampling.sampler.name", "ddpm"], "does not go with objective=flow"),
    "guidance channels": (
        TEXT,
        ["--sampling.sampler.guidance-channels", "25"],
        "guidance_channels=25 must be from 1 to the 24 channels",
    ),
    "unused labels": (TEXT, ["--sampling.labels", "1"], "sampling.labels has no effect"),
    "flow setting": (LABELS, ["--diffusion.shift", "3"], "has no effect with objective=iddpm"),
    "flow sampler": (
        LABELS,
        ["--sampling.sampler.name", "euler"],
        "does not go with objective=iddpm",
    ),
    "text encoder": (LABELS, ["--text-encoder.kind", "hashed-words"], "set text_encoder.kind=none"),
    "unlabelled": (
        LABELS,
        ["--data.manifest", "{unlabelled}"],
        "1 of 2 samples without a label, the first in line 2",
    ),
    "few classes": (
        LABELS,
        ["--model.num-classes", "2"],
        "with a label above 1, the first in line 3",
    ),
    "sampled label": (LABELS, ["--sampling.labels", "0", "3"], "has 3: labels go from 0 to 2"),
    "heads": (TEXT, ["--model.num-heads", "5"], "num_heads=5 must divide hidden_size=32"),
    "depth": (TEXT, ["--model.depth", "0"], "depth=0 must be at least 1"),
    "patch": (TEXT, ["--model.patch-size", "1", "0", "2"], "patch_size=0 must be at least 1"),
    "latent channels": (TEXT, ["--model.in-channels", "0"], "in_channels=0 must be at least 1"),
    "sequence parallel": (TEXT, ["--parallel.sp", "2"], "sp=2"),
    "weights": (TEXT, ["--train.init-from", "no.safetensors"], "no.safetensors"),
    "decay": (
        TEXT,
        [
            "--schedule.shape",
            "cosine",
            "--schedule.warmup-steps",
            "2",
            "--schedule.decay-steps",
            "1",
        ],
        "leaves nothing after warmup_steps=2",
    ),
    "output": (TEXT, ["--output", "/proc/nowhere"], "/proc/nowhere"),
    "size": (TEXT, ["--data.buckets.0.height", "33"], "33"),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory, manifest):
    """The outcome of every refused command, all of them run in one process."""
    folder = tmp_path_factory.mktemp("refused")
    rows = [{"path": "clip0.mp4", "label": 0}, {"path": "clip1.mp4"}]
    names = {
        "uncaptioned": write_manifest(manifest.parent / "uncaptioned.jsonl", rows),
        "unlabelled": write_manifest(manifest.parent / "unlabelled.jsonl", rows),
        "empty": write_manifest(manifest.parent / "empty.jsonl", []),
        "images": write_manifest(manifest.parent / "images.jsonl", [{"path": "a.png"}]),
    }
    text = tiny_config(folder, manifest)
    label = replace(labelled(text), name="labels")
    paths = {TEXT: str(save_config(text)), LABELS: str(save_config(label))}
    commands = [
        ["train", "--config", paths[kind], *(option.format(**names) for option in options)]
        for kind, options, _ in REFUSALS.values()
    ]
    outcomes = run_in_processes(_run_all, 1, commands, timeout_seconds=120)[0]
    assert not (run_folder(text) / "metrics.jsonl").exists()
    return dict(zip(REFUSALS, outcomes, strict=True))


def _run_all(commands):
    return [_run(command, {}) for command in commands]


@pytest.mark.parametrize("name", REFUSALS)
def test_misfit_is_refused_before_training(refused, name):
    outcome = refused[name]
    assert REFUSALS[name][2] in outcome.err
    assert outcome.status == (1 if name == "output" else 2)
    assert outcome.err.splitlines()[-1].startswith(("error: ", "  "))
    assert "Traceback" not in outcome.err
    assert not outcome.batches


def test_processes_tell_a_common_mistake_once(tmp_path, manifest):
    path = save_config(tiny_config(tmp_path, manifest))
    outcomes = run_in_processes(_run_as_torchrun, 2, path, timeout_seconds=60)
    assert outcomes[0].status == 2
    assert "error: " in outcomes[0].err
    assert "error on rank 1: " in outcomes[1].err
    ok = longtake_in(2, "train", "--config", path, "--train.steps", "1")
    assert [outcome.out.count("step 1/1") for outcome in ok] == [1, 0]


def test_kernels_that_cannot_go_around_a_ring_are_refused(tmp_path, manifest):
    config = labelled(tiny_config(tmp_path, manifest))
    arguments = ["--config", save_config(config), "--parallel.sp", 2, "--model.num-heads", 1]
    outcomes = longtake_in(2, "train", *arguments, "--kernels.self-attention", "sdpa")
    assert [outcome.status for outcome in outcomes] == [2, 2]
    assert 'self-attention by "sdpa" does not tell the log-sum-exp' in outcomes[0].err
    assert "Traceback" not in outcomes[0].err
    assert not outcomes[0].batches


def _run_as_torchrun(path):
    return _run(["train", "--config", str(path), "--train.accumulation", "3"], {})


def _main(*arguments):
    """In this process: for what ends before a process group starts."""
    with contextlib.suppress(SystemExit):
        return cli.main(list(arguments))
    return 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean train?"),
        (
            ["train", "--preset", "quikstart"],
            "unknown preset 'quikstart': did you mean quickstart?",
        ),
        (["train", "--preset", "x"], "choose from quickstart, dit-xl2-256"),
        (["train", "--preset", "quickstart", "--config", "x.yaml"], "give one of them"),
        (["train", "--config", "x.yaml"], "config file x.yaml: No such file"),
        (["train", "--trian.steps", "3"], "--train.steps"),
        (["train", "--data.buckets.0.heigth", "3"], "--data.buckets.0.height"),
        (["train", "--model.name", "stditt"], "'dit', "),
        (["train", "--train.steps", "x"], "--train.steps"),
        (["train", "--train.steps", "0"], "train.steps=0 must be at least 1"),
        (["train", "--optimizer.lr", "-1"], "optimizer.lr=-1.0 must be at least 0"),
        (["sample", "nowhere"], "nowhere holds no checkpoint"),
        (["doctor", "--manifest", "no.csv"], "no.csv"),
        (["doctor", "--preset", "quikstart", "--manifest", "no.csv"], "did you mean quickstart?"),
    ],
)
def test_mistake_on_the_command_line(capsys, arguments, message):
    assert _main(*arguments) == 2
    output = capsys.readouterr()
    assert message in " ".join((output.err + output.out).replace("│", " ").split())
    assert "Traceback" not in output.err


def test_usage_and_version(capsys):
    assert cli.main([]) == 0
    assert cli.main(["--version"]) == 0
    out = capsys.readouterr().out
    assert "longtake COMMAND" in out
    assert "longtake 0" in out


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ImportError("needs tensorboard: pip install 'longtake[train]'"), 2),
        (ImportError("cannot import name 'x'"), None),
        (FloatingPointError("the gradients are not finite"), 1),
        (ZeroDivisionError("ours"), None),
    ],
)
def test_only_explained_errors_lose_their_traceback(monkeypatch, capsys, error, status):
    def program(arguments):
        raise error

    monkeypatch.setattr(cli, "_program", lambda name: program)
    if status is None:
        with pytest.raises(type(error)):
            cli.main(["train"])
    else:
        assert cli.main(["train"]) == status
        assert capsys.readouterr().err == f"error: {error}\n"


def test_value_error_inside_a_library_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_program", lambda name: lambda arguments: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        cli.main(["train"])


def _promise_restarts():
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = "3"


def test_fresh_is_refused_where_every_restart_would_begin_anew(tmp_path, manifest):
    config = tiny_config(tmp_path, manifest)
    command = ["train", "--config", save_config(config), "--fresh"]
    refused = longtake(*command, before=_promise_restarts)
    assert refused.status == 2
    assert "--fresh does not go with torchrun --max-restarts" in refused.err
    assert not run_folder(config).exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--help"], ""),
        (
            ["--clips", "9", "--clip", "16x64x64", "--json", "-"],
            "error: nobody reads the output any more\n",
        ),
    ],
    ids=["help", "program"],
)
def test_a_reader_that_has_gone_is_no_traceback(options, told):
    """As behind `| head`: the status of a process that nobody reads."""
    command = [sys.executable, "-m", "longtake", "plan", "disk", *options]
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, told)
