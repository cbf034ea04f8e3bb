"""`longtake bench curve`: the same run on the fast path and twice on plain torch."""

import json

import pytest

from longtake.benchmark.curve import Curve, measure_curve, plain_fp32
from longtake.config import load_yaml
from longtake.config.run import RunConfig
from longtake.ops.kernels import PLAIN
from tests.programs.runs import longtake, save_config, tiny_config


def test_differences_are_relative_to_plain():
    curve = Curve(steps=(1, 2), fast=(1.1, 1.8), plain_same=(1.0, 2.4), plain=(1.0, 2.0))
    fast, same = curve.difference(curve.fast), curve.difference(curve.plain_same)
    assert (fast.mean, fast.largest, fast.bias) == pytest.approx((0.1, 0.1, 0.0))
    assert (same.mean, same.largest, same.bias) == pytest.approx((0.1, 0.2, 0.1))


@pytest.mark.slow
def test_all_runs_see_the_same_numbers(tmp_path, manifest):
    config = tiny_config(tmp_path, manifest)
    file = save_config(config)
    folder = tmp_path / "curve"
    arguments = ("--config", str(file), "--curve-steps", "4", "--output", str(folder))
    done = longtake("bench", "curve", *arguments)
    assert done.status == 0, done.err
    curve = json.loads((folder / "curve.json").read_text())["curve"]
    assert curve["steps"] == [1, 2, 3, 4]
    # On a CPU all are fp32: only the order of sums is different, and of none but the fast one's.
    assert curve["fast"] == pytest.approx(curve["plain"], rel=1e-4)
    assert curve["plain_same"] == curve["plain"]
    assert (folder / "curve.png").stat().st_size > 0
    assert "| 4 | " in (folder / "curve.md").read_text()
    plain = load_yaml(folder / "plain" / "config.yaml", RunConfig)
    assert plain.kernels == PLAIN
    assert plain.parallel.param_dtype == "fp32"
    assert plain_fp32(plain) == plain
    same = load_yaml(folder / "plain-same" / "config.yaml", RunConfig)
    assert same.kernels == PLAIN
    assert same.parallel.param_dtype == config.parallel.param_dtype


@pytest.mark.slow
def test_run_that_fails_says_why(tmp_path, manifest):
    config = tiny_config(tmp_path, manifest.with_name("absent.jsonl"))
    with pytest.raises(RuntimeError, match=r"the fast run ended with status 2:(.|\n)*absent"):
        measure_curve(config, tmp_path / "curve", steps=2)
