from copy import deepcopy
from dataclasses import replace

import pytest

from longtake.benchmark.jobs import Finished
from longtake.benchmark.plot import plot_table
from longtake.benchmark.records import Outcome, Protocol, load_report, save_report, timing
from longtake.benchmark.render import markdown, show
from longtake.benchmark.table import measure_table, same_settings, select, sent_bytes
from longtake.config import preset, to_plain
from longtake.ops.kernels import PLAIN
from tests.benchmark.conftest import machine, measurement, row

ROWS = [row("stdit-16x256"), row("stdit-64x512")]


class _Device:
    """Answers jobs as a device would on which only some of them fit."""

    def __init__(self, fits=lambda job: True):
        self.fits, self.jobs = fits, []

    def __call__(self, job):
        self.jobs.append(job)
        config = to_plain(job.config)
        if not self.fits(job):
            failure = "out of memory at micro-batch 1"
            return Finished(Outcome(config=config, failure=failure), does_not_fit=True)
        is_plain = job.config.kernels == PLAIN
        found = measurement(
            250.0 if is_plain else 100.0,
            micro_batch=job.options.micro_batch or 8,
            checkpointing=job.config.parallel.checkpointing,
            encoders=job.options.encoders,
        )
        return Finished(Outcome(config=config, measurement=found))


def _measure(device, rows=ROWS, **options):
    said = []
    report = measure_table(
        "video",
        rows,
        machine=machine(),
        protocol=Protocol(),
        run_job=device,
        say=said.append,
        **options,
    )
    return report, said


def test_each_row_has_its_plain_step_at_the_same_micro_batch():
    device = _Device()
    report, _ = _measure(device)
    assert [one.key for one in report.rows] == ["stdit-16x256", "stdit-64x512"]
    fast, plain = device.jobs[:2]
    assert (fast.options.sizing, fast.options.micro_batch) == ("search", None)
    assert (plain.options.sizing, plain.options.micro_batch) == ("halve", 8)
    assert plain.config.kernels == PLAIN
    assert plain.config.parallel.compile is False
    assert report.rows[0].speedup == pytest.approx(2.5)
    # The 17 TFLOP of a sample need about 35 ms at the ceilings.
    assert 25 < report.rows[0].floor_samples_per_second < 35


def test_checkpointing_is_taken_up_only_where_memory_asks_for_it():
    device = _Device(lambda job: job.config.parallel.checkpointing != "none")
    report, _ = _measure(device, [row("stdit-64x512")])
    assert report.rows[0].fast.measurement.checkpointing != "none"
    assert report.rows[0].plain.note == "does not fit without recomputing every block"
    # This row has no other policy.
    report, said = _measure(device, [row("stdit-16x256")])
    assert report.rows[0].fast.failure == "out of memory at micro-batch 1"
    assert any("failed: out of memory" in line for line in said)


def test_a_row_that_fails_does_not_stop_the_others():
    def crash(job):
        if job.config.name == "stdit-xl2-16x256":
            return Finished(Outcome(config=to_plain(job.config), failure="the process died"))
        return _Device()(job)

    report, _ = _measure(crash)
    assert report.rows[0].fast.failure == "the process died"
    assert report.rows[0].speedup is None
    assert report.rows[1].fast.measurement is not None


def test_table_is_handed_on_after_every_step_and_can_be_completed(tmp_path):
    path, device = tmp_path / "table.json", _Device()

    def interrupted(job):
        if len(device.jobs) == 2:
            raise KeyboardInterrupt
        return device(job)

    with pytest.raises(KeyboardInterrupt):
        _measure(interrupted, done=lambda report: save_report(path, report))
    kept = load_report(path, type(_measure(_Device())[0]))
    assert [one.key for one in kept.rows] == ["stdit-16x256"]
    assert same_settings(kept, ROWS)
    other = replace(ROWS[0], config=replace(ROWS[0].config, seed=7))
    assert not same_settings(kept, [other])

    second = _Device()
    report, said = _measure(second, earlier=kept)
    assert [job.config.name for job in second.jobs] == ["stdit-xl2-64x512"] * 2
    assert "  taken over" in said
    assert report.rows[0] == kept.rows[0]
    assert len(report.rows) == 2


def test_rows_are_chosen_by_pattern():
    assert [one.key for one in select(ROWS, ["*-64x512"])] == ["stdit-64x512"]
    assert select(ROWS, []) == ROWS
    with pytest.raises(ValueError, match="--rows dit fits none of stdit-16x256, stdit-64x512"):
        select(ROWS, ["dit"])


def test_markdown_says_everything():
    report, _ = _measure(_Device(lambda job: job.config.kernels != PLAIN))
    text = markdown(report)
    for part in (
        "# longtake bench table video: NVIDIA H200, 2026-11-23",
        "longtake bench table video",
        "power.limit 700 W",
        "commit abc",
        "5 warm-up steps",
        "forward, backward, clipping, AdamW, EMA",
        "989 TFLOP/s",
        "| STDiT-XL/2 16x256 | 8 | 80 |",
        "37.5 / 42.9 %",  # 300 of 800 and of 700 TFLOP/s
        "70.0 / 75.0",
        "30.3 %",
        "not measured: out of memory at micro-batch 1",
        "spatial cudnn, temporal triton",
        "H800 (one of 8)",
        "Copies: 4 TB/s",
    ):
        assert part in text, part
    table = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line.count("|") - line.count("\\|") for line in table}
    assert len(widths) == 3  # one for each of the three tables


def test_encoders_stand_beside_their_baseline_and_their_parts():
    keys = ("stdit-16x512-on-line-baseline", "stdit-16x512-on-line", "stdit-16x512-cached")
    parts = {"transformer": 60.0, "video encoder": 25.0, "text encoder": 15.0}

    def device(job):
        finished = _Device()(job)
        is_slow = job.config.text_encoder.dtype == "fp32"
        step = timing([250.0 if is_slow else 80.0], warmup_steps=1, first_step_seconds=1.0)
        rate = 4000 / step.median_ms
        found = replace(
            finished.outcome.measurement,
            timing=step,
            samples_per_second=rate,
            encode_ahead=not is_slow,
            parts_ms=parts if job.options.encoders == "on-line" else {},
        )
        return Finished(replace(finished.outcome, measurement=found))

    report, _ = _measure(device, [row(key) for key in keys], with_plain=False)
    ratios = [one.times_baseline for one in report.rows]
    assert ratios == [1.0, pytest.approx(3.125), pytest.approx(3.125)]
    text = markdown(report)
    line = next(
        line for line in text.split("## Encoders")[1].splitlines() if "encoding ahead" in line
    )
    for part in ("| 50 |", "3.12", "60 ms, 66.67/s", "25 ms, 160/s", "100 ms, 40/s", "| 1.25 |"):
        assert part in line, part
    # Without its baseline a row is as fast as it is.
    alone, _ = _measure(device, [row(keys[1])], with_plain=False)
    assert alone.rows[0].times_baseline is None
    assert alone.rows[0].fast.measurement.samples_per_second == 50


def test_terminal_table_does_not_wrap_into_a_file(capsys):
    from rich.console import Console

    show(_measure(_Device())[0], Console())
    out = capsys.readouterr().out
    assert any("STDiT-XL/2 16x256" in line and "2.5" in line for line in out.splitlines())


def test_plot_shows_rows_that_were_measured(tmp_path):
    pytest.importorskip("matplotlib")
    report, _ = _measure(_Device(lambda job: job.config.name != "stdit-xl2-64x512"))
    plot_table(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    plot_table(replace(report, rows=()), tmp_path / "empty.png")


def test_plot_draws_rows_without_a_floor_beside_the_fastest_of_their_kind(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    report, _ = _measure(_Device())
    one = next(row for row in report.rows if row.fast.measurement is not None)
    assert one.fast.measurement is not None
    slow = replace(one, key="slow", baseline=None, floor_samples_per_second=None, plain=None)
    twice = replace(
        one.fast.measurement, samples_per_second=2 * one.fast.measurement.samples_per_second
    )
    fast = replace(slow, key="fast", baseline="slow", fast=replace(one.fast, measurement=twice))
    other = replace(slow, key="other")
    plot_table(replace(report, rows=(slow, fast, other)), tmp_path / "plot.png")
    axes = pyplot.gcf().axes[0]
    widths = [bar.get_width() for bar in axes.patches if bar.get_facecolor()[0] > 0.8]
    assert widths == pytest.approx([0.5, 1.0, 1.0])


TWO = [row(f"stdit-64x512{end}") for end in ("", "-dp2", "-sp2")] + [row("stdit-16x256-dp2")]


def _on_gpus(device, count, rows=TWO):
    own = machine()
    own = replace(own, environment=own.environment | {"gpus": count})
    said = []
    report = measure_table(
        "video", rows, machine=own, protocol=Protocol(), run_job=device, say=said.append
    )
    return {one.key: one for one in report.rows}, said, report


def test_rows_for_two_gpus_say_why_they_were_skipped():
    found, said, report = _on_gpus(_Device(), 1)
    assert found["stdit-64x512-sp2"].fast.failure == "needs 2 GPUs, this machine has 1"
    assert "  skipped: needs 2 GPUs, this machine has 1" in said
    assert "STDiT-XL/2 64x512, sp=2 | not measured: needs 2 GPUs, this" in markdown(report)
    # With two, but without the row that a micro-batch could be taken from.
    found, _, _ = _on_gpus(_Device(), 2)
    assert "measure that with it" in found["stdit-16x256-dp2"].fast.failure


def test_two_gpus_are_rated_against_one_and_shared_tokens_against_shared_samples():
    rates = {1: 1.6, 2: 1.5}

    def device(job):
        finished = _Device()(job)
        sp = job.config.parallel.sp
        rate = 1.35 if sp == 2 else rates[job.num_processes]
        found = replace(
            finished.outcome.measurement,
            num_devices=job.num_processes,
            sp=sp,
            samples_per_second=rate,
            latents=(4, 64, 64, 64),
        )
        return Finished(replace(finished.outcome, measurement=found))

    rows = [row("stdit-16x256"), *TWO]
    found, _, report = _on_gpus(device, 2, rows)
    assert found["stdit-64x512-dp2"].times_baseline == pytest.approx(1.5 / 1.6)
    shared = found["stdit-64x512-sp2"]
    assert shared.times_baseline == pytest.approx(1.35 / 1.5)
    assert shared.fast.measurement.micro_batch == 2  # as many samples in a step as dp=2 takes
    assert found["stdit-16x256-dp2"].fast.measurement.micro_batch == 8  # the search's
    assert found["stdit-16x256-dp2"].plain is None
    assert shared.floor_samples_per_second is None

    exchanged, sharded = sent_bytes(shared.fast.measurement, shared.fast.config)
    # Two exchanges a block, forward and backward; half of 64 x 1024 tokens leaves a GPU each time.
    assert exchanged == 2 * 2 * 28 * (64 * 1024 * 1152 * 2) / 2
    # Weights in bf16 gathered once, gradients in float32 reduced once.
    assert sharded == (2 + 4) * 759_620_768 / 2
    kept = deepcopy(shared.fast.config)
    kept["parallel"] |= {"checkpointing": "full", "kept_blocks": 7}
    again, _ = sent_bytes(shared.fast.measurement, kept)
    assert again == (2 + 21 / 28) * exchanged / 2
    kept["parallel"] |= {"zero": 0}
    # Nothing is gathered, and gradients are all-reduced: 2 (n - 1) / n of them.
    assert sent_bytes(shared.fast.measurement, kept)[1] == 2 * 4 * 759_620_768 / 2
    text = markdown(report)
    assert "dp=1, sp=2 | 2.7 | 1.35 | stdit-64x512-dp2 | 0.9 | 10.0% | 8.46 GB | 2.28 GB" in text
    assert "dp=2, sp=1 | 3 | 1.5 | stdit-64x512 | 0.938 | 6.2% | 0 GB | 2.28 GB" in text


@pytest.mark.parametrize(
    ("sp", "checkpointing", "passes"),
    # Of a process's tokens, over 28 blocks: 4 in all-to-alls among n, (n - 1) / n of which leave,
    # and 2 (r - 1) around a ring of r; a backward sends as much and twice as much.
    [
        (2, "none", 2 * 4 / 2),
        (3, "none", 3 * 4),
        (6, "none", 2 * 4 / 2 + 3 * 4),
        (6, "full", 3 * 4 / 2 + 4 * 4),
        (6, "nested", 4 * 4 / 2 + 5 * 4),
    ],
)
def test_what_full_attention_sends_leaves_in_exchanges_and_around_rings(sp, checkpointing, passes):
    config = to_plain(preset("pixart-xl2-16x256"))
    config["parallel"] |= {"sp": sp, "checkpointing": checkpointing, "kept_blocks": 0}
    found = measurement(micro_batch=3, latents=(4, 3, 64, 64), sp=sp, num_devices=sp)
    tokens, _ = sent_bytes(found, config)
    assert tokens == pytest.approx(3 * passes * 28 * (3 * 1024 // sp) * 1152 * 2)
