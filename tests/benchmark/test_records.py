import json

import pytest

from longtake.benchmark.compare import compare
from longtake.benchmark.records import (
    Outcome,
    Protocol,
    RowReport,
    StepReport,
    TableReport,
    load_any_report,
    load_report,
    save_report,
)
from longtake.config import preset, to_plain
from tests.benchmark.conftest import CEILINGS, measurement

CONFIG = to_plain(preset("stdit-xl2-16x256"))


def _step(found, failure=None):
    return StepReport(
        environment={"python": "3.12", "gpu": {}},
        protocol=Protocol(),
        config=CONFIG,
        measurement=found,
        failure=failure,
        ceilings=CEILINGS,
    )


def _table(**rows):
    return TableReport(
        table="video",
        environment={},
        protocol=Protocol(),
        rows=tuple(
            RowReport(key=key, title=key, fast=Outcome(config=CONFIG, measurement=found))
            for key, found in rows.items()
        ),
    )


def test_reports_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "deep" / "report.json"
    for report in (_step(measurement()), _step(None, "out of memory"), _table(a=measurement())):
        save_report(path, report)
        assert load_any_report(path) == report
    assert [child.name for child in path.parent.iterdir()] == ["report.json"]


def test_what_is_no_report_is_refused(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(ValueError, match="No such file"):
        load_any_report(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="format None, expected 1"):
        load_any_report(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_any_report(path)
    save_report(path, _step(measurement()))
    values = json.loads(path.read_text())
    values["measurement"]["micro_batch"] = "8"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"measurement\.micro_batch"):
        load_report(path, StepReport)


@pytest.mark.parametrize(
    ("step_ms", "verdict", "is_worse"),
    [
        (100.0, "as before", False),
        (102.5, "as before", False),  # within the tolerance
        (110.0, "slower", True),
        (80.0, "faster", False),
    ],
)
def test_slower_is_beyond_tolerance_and_spread(step_ms, verdict, is_worse):
    (found,) = compare(_step(measurement()), _step(measurement(step_ms)))
    assert (found.verdict, found.is_worse) == (verdict, is_worse)
    assert found.ratio == pytest.approx(100 / step_ms)


def test_slower_within_the_spread_is_noise():
    (found,) = compare(_step(measurement()), _step(measurement(101.5)), tolerance=0.01)
    assert not found.is_worse


def test_another_micro_batch_is_compared_per_sample():
    (found,) = compare(_step(measurement(100)), _step(measurement(200, micro_batch=16)))
    assert (found.verdict, found.ratio) == ("micro-batch 8 → 16", 1.0)
    (found,) = compare(_step(measurement(100)), _step(measurement(230, micro_batch=16)))
    assert found.is_worse
    assert found.verdict == "slower, micro-batch 8 → 16"


def test_memory_that_grew_is_worse():
    (found,) = compare(_step(measurement()), _step(measurement(peak_allocated_gib=80.0)))
    assert (found.verdict, found.is_worse) == ("more memory", True)


def test_rows_that_are_missing_or_new_are_named():
    before = _table(a=measurement(), b=measurement())
    after = _table(a=measurement(), b=None, c=measurement())
    found = {one.name: (one.verdict, one.is_worse) for one in compare(before, after)}
    assert found == {
        "a": ("as before", False),
        "b": ("no longer measured", True),
        "c": ("new", False),
    }


def test_reports_without_a_common_row_are_refused():
    with pytest.raises(ValueError, match="no row in common: one has a, the other b"):
        compare(_table(a=measurement()), _table(b=measurement()))
