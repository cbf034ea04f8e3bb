import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from longtake.benchmark.measure import StepOptions, as_plain, is_out_of_memory, measure_step
from longtake.benchmark.records import StepReport
from longtake.benchmark.render import show_step
from longtake.benchmark.search import DoesNotFit
from longtake.benchmark.subject import Subject
from longtake.ops.kernels import PLAIN, KernelConfig, current_kernels
from longtake.planning import TokenGrid, forward_macs
from tests.benchmark.conftest import QUICK, real_encoders, tiny_row

ON_LINE = tiny_row("stdit-16x256-on-line").config


def test_measurement_says_what_ran(measured):
    # 4 frames of 32x32 pixels: 4 x 2 x 2 patches.
    assert measured.latents == (16, 4, 4, 4)
    assert measured.tokens_per_sample == 16
    assert measured.micro_batch == 2
    assert measured.encoders == "on-line"
    assert len(measured.timing.step_ms) == 2
    seconds = measured.timing.median_ms / 1000
    assert measured.samples_per_second == pytest.approx(2 / seconds)
    assert measured.tokens_per_second == pytest.approx(32 / seconds)
    macs = forward_macs(
        "stdit", TokenGrid(4, 4), hidden_size=128, depth=1, text_tokens=24, mlp_ratio=4.0
    )
    assert measured.model_tflops == pytest.approx(2 * 6 * macs / seconds / 1e12)
    assert measured.mfu is None  # a CPU has no published peak
    assert measured.kernels.keys() == {"spatial", "temporal", "text", "element-wise"}
    assert (measured.precision, measured.compiled, measured.checkpointing) == (
        ("bf16", True, "selective") if torch.cuda.is_available() else ("fp32", False, "selective")
    )
    assert measured.first_loss != measured.last_loss


def _memory_for(monkeypatch, micro_batches):
    """Steps of larger micro-batches run out of memory, as they do on a GPU."""
    made = []
    build = Subject.workload

    def workload(self, number, micro_batch):
        made.append(micro_batch)
        if micro_batch > micro_batches:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return build(self, number, micro_batch)

    monkeypatch.setattr(Subject, "workload", workload)
    return made


def test_micro_batch_is_halved_until_it_fits(mesh, monkeypatch):
    tried = _memory_for(monkeypatch, 2)
    options = StepOptions(protocol=QUICK, sizing="halve", micro_batch=8)
    measured = measure_step(tiny_row("dit-256").config, mesh, options)
    assert measured.micro_batch == 2
    assert tried == [8, 4, 2, 2]
    rates = [trial.samples_per_second for trial in measured.trials]
    assert [rate is not None for rate in rates] == [False, False, True]


def test_micro_batch_is_searched(mesh, monkeypatch):
    tried = _memory_for(monkeypatch, 2)
    options = StepOptions(protocol=QUICK, sizing="search", micro_batch=1)
    measured = measure_step(tiny_row("dit-256").config, mesh, options)
    assert tried[-1] == measured.micro_batch
    rates = {trial.micro_batch: trial.samples_per_second or 0 for trial in measured.trials}
    assert rates[measured.micro_batch] == max(rates.values())


@pytest.mark.parametrize("sizing", ["fixed", "halve", "search"])
def test_what_does_not_fit_at_all_is_said(mesh, monkeypatch, sizing):
    _memory_for(monkeypatch, 0)
    options = StepOptions(protocol=QUICK, sizing=sizing, micro_batch=2)
    with pytest.raises(DoesNotFit, match="micro-batch"):
        measure_step(tiny_row("dit-256").config, mesh, options)


def test_other_errors_are_not_taken_for_a_lack_of_memory(mesh, monkeypatch):
    def broken(self, number, micro_batch):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Subject, "workload", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        measure_step(tiny_row("dit-256").config, mesh, StepOptions(protocol=QUICK, sizing="halve"))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"))


def test_a_loss_that_is_not_finite_is_an_error(mesh, monkeypatch):
    step = Subject.step

    def spoilt(self, workload):
        result = step(self, workload)
        return replace(result, loss=result.loss * float("nan"))

    monkeypatch.setattr(Subject, "step", spoilt)
    with pytest.raises(FloatingPointError, match="not finite"):
        measure_step(tiny_row("dit-256").config, mesh, StepOptions(protocol=QUICK))


def test_plain_step_runs_on_plain_torch_and_kernels_are_put_back(mesh):
    config = as_plain(tiny_row("stdit-16x256").config)
    assert config.kernels == PLAIN
    measured = measure_step(config, mesh, StepOptions(protocol=QUICK, micro_batch=1))
    assert set(measured.kernels.values()) == {"reference"}
    assert not measured.compiled
    assert current_kernels() == KernelConfig()


@pytest.mark.parametrize("key", ["dit-256", "stdit-16x256-cached"])
def test_encodings_as_from_a_store_are_drawn_and_scaled_in_the_step(mesh, key):
    config = tiny_row(key).config
    subject = Subject(config, mesh, encoders="cached", seed=0)
    workload = subject.workload(0, 2)
    batch, inputs = workload.batches[0], next(workload.inputs)
    assert batch.mean_BCTHW.dtype == torch.bfloat16
    assert inputs.clean_BCTHW.dtype == torch.float32
    assert inputs.clean_BCTHW.shape == batch.mean_BCTHW.shape
    assert not torch.equal(inputs.clean_BCTHW, batch.mean_BCTHW.float()), "scaled"
    is_text = config.text_encoder.kind != "none"
    assert inputs.condition.keys() == (
        {"prompt_embeds_BLK", "prompt_mask_BL"} if is_text else {"labels_B"}
    )
    measured = measure_step(config, mesh, StepOptions(protocol=QUICK, encoders="cached"))
    assert measured.encoders == "cached"
    assert not measured.parts_ms


def test_encoding_ahead_is_timed_beside_its_parts(mesh, tmp_path):
    found = {}
    for ahead in (False, True):
        config = real_encoders(ON_LINE, tmp_path, encode_ahead=ahead)
        options = StepOptions(protocol=QUICK, encoders="on-line", micro_batch=2)
        found[ahead] = measure_step(config, mesh, options)
        assert found[ahead].encode_ahead is ahead
        assert found[ahead].parts_ms.keys() == {"transformer", "video encoder", "text encoder"}
        assert all(ms > 0 for ms in found[ahead].parts_ms.values())
    # The same steps on the same numbers.
    assert found[False].first_loss == found[True].first_loss
    assert found[False].last_loss == found[True].last_loss
    report = StepReport(environment={}, protocol=QUICK, config={}, measurement=found[True])
    text = io.StringIO()
    show_step(report, Console(file=text), brief=False)
    assert "sum of the parts" in text.getvalue()
    assert "on-line, ahead" in text.getvalue()


def test_cached_statistics_of_a_real_class_have_a_posterior(mesh, tmp_path):
    subject = Subject(real_encoders(ON_LINE, tmp_path), mesh, encoders="cached", seed=0)
    workload = subject.workload(0, 2)
    batch, inputs = workload.batches[0], next(workload.inputs)
    mean_BCTHW = 0.18215 * batch.mean_BCTHW.float()
    spread = (inputs.clean_BCTHW - mean_BCTHW).std()
    # exp(-10 / 2) and exp(0.5 n) of normal n with variance 1, on average exp(0.5) in the square.
    assert spread == pytest.approx(0.18215 * 0.00674 * 1.65**0.5, rel=0.2)


def test_bucket_must_exist(mesh):
    with pytest.raises(ValueError, match="bucket=1: the configuration has 1"):
        measure_step(tiny_row("dit-256").config, mesh, StepOptions(bucket=1))
