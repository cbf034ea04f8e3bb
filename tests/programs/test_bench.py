"""`longtake bench` from the command line, on a model that a CPU steps in milliseconds."""

import json
import sys
from unittest import mock

import pytest

from longtake.benchmark.records import StepReport, TableReport, load_report
from longtake.programs import bench
from tests.programs.runs import longtake, longtake_in

QUICK = ("--warmup", 1, "--steps", 2)
SMALL = ("--model.depth", 1, "--set", "data.buckets.0.num-frames=2")
TABLE = ("bench", "table", "images", "--size", "tiny", "--rows", "dit-256-batch128", *QUICK)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A report of `bench step`, and what it printed."""
    path = tmp_path_factory.mktemp("step") / "step.json"
    arguments = ("--preset", "quickstart", *SMALL, "--micro-batch", 2, *QUICK, "--json", path)
    outcome = longtake("bench", "step", *arguments)
    assert outcome.status == 0, outcome.err
    return path, outcome.out


def test_step_prints_its_protocol_and_writes_a_report(step):
    path, out = step
    for text in (
        "1 warm-up steps",
        "data loading is not part of it",
        "longtake bench step",
        "stdit2-tiny/2 2x64x96",
        "Copies:",
    ):
        assert text in out
    report = load_report(path, StepReport)
    assert report.config["model"]["depth"] == 1
    assert report.measurement is not None
    assert report.measurement.micro_batch == 2
    assert report.ceilings is not None
    assert report.environment["packages"]["torch"]


def test_compare_finds_the_slower_report(step, tmp_path, capsys):
    path, _ = step
    values = json.loads(path.read_text())
    timing = values["measurement"]["timing"]
    for name in ("median_ms", "min_ms", "max_ms"):
        timing[name] *= 100
    values["measurement"]["samples_per_second"] /= 100
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(values))
    assert bench.main(["--compare", str(path), str(slower)]) == 1
    assert "slower" in capsys.readouterr().out
    assert bench.main(["table", "video", "--compare", str(slower), str(path)]) == 0
    assert bench.main(["compare", str(path), str(path)]) == 0
    assert "as before" in capsys.readouterr().out


def test_mistakes_are_told(tmp_path):
    for arguments, message in (
        (["tables"], "bench tables does not exist: use table, step"),
        (["table", "images", "--rows", "nothing"], "--rows nothing fits none of dit-256"),
        (["table", "images", "--resume"], "--resume completes the table in --output"),
        (["table", "images", "--set", "model"], "--set model: expected key=value"),
        (["step", "--preset", "quickstart", "--bucket", "3"], "bucket=3: the configuration has 1"),
    ):
        outcome = longtake("bench", *arguments)
        assert outcome.status == 2, outcome.err
        assert message in outcome.err


def test_help_names_the_subcommands(capsys):
    assert bench.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"bench {name}" in out for name in ("table", "step", "ceilings", "compare"))
    with pytest.raises(SystemExit) as ended:
        bench.main(["step", "--help"])
    assert ended.value.code == 0
    assert "--micro-batch" in capsys.readouterr().out


def test_rows_can_be_listed(capsys):
    assert bench.main(["table", "video", "--list"]) == 0
    assert "stdit-16x512 " in capsys.readouterr().out


@pytest.mark.slow
def test_table_is_measured_in_processes_of_its_own_and_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "report"
    command = [*map(str, TABLE[1:]), "--output", str(output)]
    assert bench.main(command) == 0
    out = capsys.readouterr().out
    assert "row 1 of 1: tiny stand-in for DiT-XL/2 256x256, micro-batch 128" in out
    assert "the same on plain torch" in out
    (row,) = load_report(output / "table.json", TableReport).rows
    assert row.fast.measurement is not None
    assert row.plain is not None
    assert row.plain.measurement is not None
    assert row.fast.measurement.micro_batch == row.plain.measurement.micro_batch == 2
    assert set(row.plain.measurement.kernels.values()) == {"reference"}
    assert row.speedup is not None
    assert "longtake bench table images --size tiny" in (output / "table.md").read_text()
    assert (output / "plot.png").exists()

    with pytest.raises(ValueError, match="add --resume to complete it"):
        bench.main(command)
    for other in (["--set", "model.depth=2"], ["--steps", "3"]):
        with pytest.raises(ValueError, match="other settings or another protocol"):
            bench.main([*command, "--resume", *other])
    assert bench.main([*command, "--resume"]) == 0
    assert "taken over" in capsys.readouterr().out
    (again,) = load_report(output / "table.json", TableReport).rows
    assert (again.fast, again.plain) == (row.fast, row.plain)


@pytest.mark.slow
def test_rows_of_two_processes_are_measured_by_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "report"
    arguments = ("--size", "tiny", "--rows", "stdit-64x512-?p2", *QUICK, "--output", output)
    assert bench.main(["table", "video", *map(str, arguments)]) == 0
    shared_samples, shared_tokens = load_report(output / "table.json", TableReport).rows
    for row, sp in ((shared_samples, 1), (shared_tokens, 2)):
        measured = row.fast.measurement
        assert measured is not None, row.fast.failure
        assert (measured.num_devices, measured.sp, measured.micro_batch) == (2, sp, 2)
    assert shared_tokens.times_baseline is not None
    assert "Several GPUs" in capsys.readouterr().out


def test_one_process_of_several_that_fails_takes_the_others_along():
    from longtake.benchmark.jobs import _run

    program = (
        "import os, sys, time\n"
        "time.sleep(0 if os.environ['RANK'] == '1' else 60)\n"
        "print('no memory'); sys.exit(3)"
    )
    said = []
    with mock.patch("longtake.benchmark.jobs._GRACE_SECONDS", 0.5):
        status, last = _run([sys.executable, "-c", program], said.append, 50, num_processes=2)
    assert (status, last) == (3, "no memory")


def test_a_row_whose_process_dies_says_why(tmp_path):
    from longtake.benchmark.jobs import Job, run_in_process
    from longtake.benchmark.measure import StepOptions
    from tests.benchmark.conftest import tiny_row

    said = []
    config = tiny_row("dit-256").config
    job = Job(config, StepOptions(bucket=5))
    finished = run_in_process(job, say=said.append, timeout_seconds=120)
    assert finished.outcome.failure == (
        "the process ended with status 2: error: bucket=5: the configuration has 1 buckets"
    )
    assert not finished.does_not_fit
    assert said[-1] == "error: bucket=5: the configuration has 1 buckets"
    finished = run_in_process(job, say=said.append, timeout_seconds=0.2)
    assert "was killed" in (finished.outcome.failure or "")


def test_profile_splits_a_step_and_writes_a_report(tmp_path):
    path = tmp_path / "profile.json"
    arguments = ("--preset", "quickstart", *SMALL, "--micro-batch", 1, *QUICK, "--json", path)
    more = ("--profiled-steps", 1, "--also-bucket", "1x32x32")
    outcome = longtake("bench", "profile", *arguments, *more)
    assert outcome.status == 0, outcome.err
    assert "Steps of 2x64x96 at micro-batch 1, 1x32x32 at micro-batch 1" in outcome.out
    profile = json.loads(path.read_text())["profile"]
    assert profile["split"]["parts_ms"]["backward"] > 0
    assert len(profile["split"]["costliest"]) > 10
    outcome = longtake("bench", "profile", "--also-bucket", "32x32")
    assert "expected frames x height x width" in outcome.err


def test_processes_of_one_run_are_timed_together(tmp_path):
    path = tmp_path / "step.json"
    arguments = ("--preset", "quickstart", *SMALL, *QUICK, "--no-ceilings", "--json", path)
    first, second = longtake_in(2, "bench", "step", *arguments)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "samples/s" in first.out
    assert second.out == ""
    measured = load_report(path, StepReport).measurement
    assert measured is not None
    assert measured.num_devices == 2
    assert measured.micro_batch == 4  # half of the bucket's 8 each
    searching = longtake_in(2, "bench", "step", *arguments, "--sizing", "search")
    assert "give --micro-batch a number under torchrun" in searching[0].err


def test_processes_that_share_tokens_are_rated_per_device(tmp_path):
    path = tmp_path / "step.json"
    arguments = ("--preset", "quickstart", *SMALL, *QUICK, "--no-ceilings", "--json", path)
    first, second = longtake_in(2, "bench", "step", *arguments, "--parallel.sp", 2)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "sp=2" in first.out
    measured = load_report(path, StepReport).measurement
    assert measured is not None
    assert (measured.num_devices, measured.sp) == (2, 2)
    assert measured.micro_batch == 8  # all of the bucket's, for both
    seconds = measured.timing.median_ms / 1000
    assert measured.samples_per_second == pytest.approx(8 / 2 / seconds)
