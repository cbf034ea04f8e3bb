"""`longtake plan`: the arithmetic that the documentation quotes, and a plan beside a real store."""

import json

import pytest
import torch

from longtake import cli
from longtake.config import peak_of_grid
from longtake.config.command_line import parse_train
from longtake.models import build_model_from_config
from tests.programs.runs import tiny_config, write_manifest
from tests.programs.stores import encode_here, files_of, make_many_clips

FIFTY_TERABYTES = "--clips 10000000 --latent 4x64x64x64 --form fp32 --padded"


def _plan(capsys, text):
    assert cli.main(["plan", "disk", *text.split()]) == 0
    return capsys.readouterr().out


def test_fifty_terabytes(capsys):
    out = _plan(capsys, FIFTY_TERABYTES)
    assert "10,000,000 clips as latents of 4x64x64x64" in out
    assert "51.8 TB (47.1 TiB): fp32 sample. What this takes for granted:" in out
    assert "Every caption is taken to have 120 tokens" in out
    # The same clips, named by their pixels.
    assert _plan(capsys, FIFTY_TERABYTES.replace("--latent 4x64x64x64", "--clip 64x512x512")) == out


def test_figures_as_json(capsys, tmp_path):
    out = _plan(capsys, f"{FIFTY_TERABYTES} --caption-tokens 20:0.6,80:0.4 --json -")
    report = json.loads(out)
    assert report["plan"]["total"] == 51_773_440_000_000
    assert report["true_tokens"] == pytest.approx(44)
    assert {(p["form"], p["tokens"]) for p in report["alternatives"]} == {
        (form, tokens) for form in ("fp32", "bf16", "8bit") for tokens in (120, 44)
    }
    file = tmp_path / "plan.json"
    assert "51.8 TB" in _plan(capsys, f"{FIFTY_TERABYTES} --json {file}")
    assert json.loads(file.read_text())["plan"] == report["plan"]


def test_a_manifest_is_counted(capsys, tmp_path):
    rows = [{"path": f"{k}.mp4", "caption": "two words" if k % 2 else "one"} for k in range(6)]
    rows.append(rows[0])
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    out = _plan(capsys, f"--manifest {manifest} --clip 4x32x32 --json -")
    plan = json.loads(out)["plan"]
    assert (plan["clips"], plan["captions"]) == (6, 2)
    assert plan["tokens"] == pytest.approx((4 + 3) / 2)  # 1.3 tokens a word, rounded up, and an end


def test_a_store_takes_what_was_planned(capsys, tmp_path):
    manifest = make_many_clips(tmp_path, 12)
    config = tiny_config(tmp_path, manifest)
    assert encode_here(config, tmp_path / "store") == 0
    capsys.readouterr()
    out = _plan(
        capsys,
        f"--manifest {manifest} --latent 24x4x4x4 --no-posterior --text-channels 16 "
        "--max-tokens 8 --tokens-per-word 1 --json -",
    )
    planned = json.loads(out)["plan"]["total"]
    stored = sum(map(len, files_of(tmp_path / "store").values()))
    assert planned < stored < planned + 12 * 1000 + 8000, (
        "names and checksums are under 1 kB a clip"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "give the number of --clips or a --manifest, one of the two"),
        ("--clips 3 --manifest m.csv", "one of the two"),
        ("--clips 3", "give --clip (pixels) or --latent, one of the two"),
        ("--clips 3 --clip 16x256", "--clip 16x256: expected 3 whole numbers, such as 16x256x256"),
        ("--clips 3 --latent 4x-1x2x2", "--latent 4x-1x2x2: expected 4 whole numbers"),
        ("--clips 0 --latent 4x1x2x2", "clips=0 must be at least 1"),
        ("--clips 3 --latent 4x1x2x2 --caption-tokens many", "--caption-tokens many: expected a"),
        ("--clips 3 --latent 4x1x2x2 --caption-tokens inf", "--caption-tokens inf: expected a"),
    ],
)
def test_mistakes_are_named(capsys, text, problem):
    assert cli.main(["plan", "disk", *text.split()]) == 2
    assert problem in capsys.readouterr().err


def test_other_plans_do_not_exist(capsys):
    assert cli.main(["plan", "party"]) == 2
    assert "plan party does not exist: use disk" in capsys.readouterr().err
    assert cli.main(["plan"]) == 0
    assert "longtake plan disk" in capsys.readouterr().out


def _plan_layout(capsys, *arguments):
    status = cli.main(["plan", "layout", "--preset", "stdit-xl2-64x512", *map(str, arguments)])
    return status, capsys.readouterr()


def test_a_layout_is_recommended_in_words_that_train_takes(capsys):
    status, said = _plan_layout(capsys, "--gpus", 16)
    assert status == 0
    assert "760M parameters, 65,536 tokens a sample of 64x512x512, batches of 16" in said.out
    options = said.out.strip().splitlines()[-1].split()
    config = parse_train(["--preset", "stdit-xl2-64x512", *options]).config
    assert config.parallel.dp_replicate * config.parallel.dp_shard * config.parallel.sp == 16
    # More GPUs than samples: only sharing tokens gives all of them work.
    _, said = _plan_layout(capsys, "--gpus", 64)
    assert said.out.strip().splitlines()[-1].endswith("--parallel.sp 4 --train.accumulation 1")


def test_what_train_takes_divides_every_batch(capsys):
    batches = ("--data.buckets.0.batch-size", 20)
    _, said = _plan_layout(capsys, "--gpus", 8, *batches, "--all")
    cells = [line.split() for line in said.out.splitlines()]
    grids = {tuple(map(int, row[:3])) for row in cells if row and row[0].isdigit()}
    assert {replicas * shards for replicas, shards, _ in grids} == {1, 2, 4}  # and not 8
    options = said.out.strip().splitlines()[-1].split()
    config = parse_train(["--preset", "stdit-xl2-64x512", *options]).config
    groups = config.parallel.dp_replicate * config.parallel.dp_shard
    assert 20 % (groups * config.train.accumulation) == 0
    assert groups * config.parallel.sp == 8


def test_memory_is_what_a_run_would_be_told(capsys):
    policy = ("--parallel.offload", "True", "--parallel.checkpointing", "nested")
    _, said = _plan_layout(capsys, "--gpus", 2, *policy, "--parallel.kept-inputs", 3)
    assert "checkpointing nested, offloaded but 3 inputs; 2 GPUs" in said.out
    (row,) = (line.split() for line in said.out.splitlines() if line.split()[:3] == ["1", "1", "2"])
    config = parse_train(
        ["--preset", "stdit-xl2-64x512", "--parallel.sp", "2", *policy, "--parallel.kept-inputs=3"]
    ).config
    with torch.device("meta"):
        model = build_model_from_config(config.model)
    latents = (4, 64, 64, 64)
    how = {"micro_batch": 1, "shards": 2, "processes": 2, "sp": 2, "accumulation": 16}
    expected = peak_of_grid(config, model, latents, **how)
    assert row[3] == f"{expected.total / 2**30:.1f}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--gpus", 1024),
            "batches of 16 do not divide into what 1024 GPUs take at once, of which at most 8",
        ),
        (
            ("--gpus", 8, "--memory-gib", 2),
            "no layout fits into --memory-gib 2: the least is 5 GiB. Try --parallel.checkpointing "
            "nested --parallel.offload True (4 GiB), a smaller --micro-batch, or more GPUs",
        ),
        (("--gpus", 8, "--tflops", 0), "--tflops 0 must be above 0"),
    ],
)
def test_a_layout_that_cannot_be_is_explained(capsys, arguments, message):
    status, said = _plan_layout(capsys, *arguments)
    assert status == 2
    assert message in said.err
