import logging

import pytest

from longtake.training import ProgressBar, Throughput, show_log

SPEED = Throughput(
    step_seconds=0.5,
    samples_per_second=16.0,
    tokens_per_second=2048.0,
    tokens_per_second_per_device=2048.0,
    seconds_left=3725.0,
    mfu=0.412,
)


def test_without_a_terminal_each_report_is_one_line(capsys):
    bar = ProgressBar(100, done=0, is_shown=True)
    with bar.shown():
        bar.advance()
        bar.report(10, SPEED, {"train/loss": 0.12345})
        bar.report(20, SPEED, None)
        bar.say("a long line " * 20)
    lines = capsys.readouterr().out.splitlines()
    expected = "16.0 samples/s · 2,048 tokens/s · MFU 41.2% · 1:02:05 left"
    assert lines[0] == f"step 10/100 · loss 0.1235 · {expected}"
    assert lines[1] == f"step 20/100 · {expected}"
    assert lines[2] == "a long line " * 20
    assert len(lines) == 3


def test_other_processes_are_silent(capsys):
    bar = ProgressBar(100, done=0, is_shown=False)
    with bar.shown():
        bar.report(10, SPEED, {"train/loss": 0.1})
        bar.say("x")
    assert capsys.readouterr().out == ""


@pytest.fixture
def logger():
    logger = logging.getLogger("longtake")
    before = list(logger.handlers), logger.level
    logger.handlers = []
    yield logger
    logger.handlers, logger.level = before[0], before[1]


def test_log_goes_to_standard_error_in_one_piece(logger, capsys):
    show_log(is_first=True)
    show_log(is_first=True)
    logger.getChild("x").info("[red]saved %s", "word " * 60)
    err = capsys.readouterr().err
    assert err.count("[red]saved word") == 1
    assert len(err.splitlines()) == 1


def test_log_of_other_processes_holds_errors_only(logger, capsys):
    show_log(is_first=False)
    logger.warning("quiet")
    logger.error("loud")
    err = capsys.readouterr().err
    assert "loud" in err
    assert "quiet" not in err
