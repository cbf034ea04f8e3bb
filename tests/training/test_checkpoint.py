from __future__ import annotations

import logging
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from longtake.parallel import ParallelConfig, local_part
from longtake.training import (
    STOPPED_EXIT_CODE,
    CheckpointError,
    Ema,
    latest,
    load_weights_for_inference,
    read_metrics,
)
from longtake.training.checkpoint import training_state
from longtake.training.checkpoint_folder import find_damage, read_manifest, steps_saved
from tests.processes import Processes, run_in_processes
from tests.toy_model import ToyModel
from tests.training.toy_run import build_run, checkpointer_of, train, train_or_exit


def _save(folder: Path, config: ParallelConfig | None = None, steps: int = 3):
    run = build_run(config)
    checkpointer = checkpointer_of(run, folder)
    start = (checkpointer.resume(run.model, run.optimizer, run.ema) or {"step": 0})["step"]
    for step in range(start, start + steps):
        run.step(step)
    checkpointer.save(start + steps, run.model, run.optimizer, run.ema, {"note": "ü"})
    checkpointer.close()
    return run.full()


def _load(folder: Path, config: ParallelConfig | None = None):
    run = build_run(config)
    checkpointer = checkpointer_of(run, folder)
    extra = checkpointer.resume(run.model, run.optimizer, run.ema)
    checkpointer.close()
    return extra, run.full()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_any_number_of_processes_reads_what_any_other_wrote(tmp_path):
    hybrid = ParallelConfig(dp_replicate=2)
    state = run_in_processes(_save, 2, tmp_path)[0]
    replicas = ParallelConfig(zero=0)
    for world_size, config in ((1, None), (4, None), (4, hybrid), (2, replicas)):
        for extra, found in run_in_processes(_load, world_size, tmp_path, config):
            assert_equal(found, state)
            assert extra == {"step": 3, "note": "ü"}
    # And on: what one process and four make of it is read by two.
    for world_size, config in ((1, None), (4, hybrid)):
        state = run_in_processes(_save, world_size, tmp_path, config)[0]
        extra, found = run_in_processes(_load, 2, tmp_path)[0]
        assert_equal(found, state)
    assert extra["step"] == 9


def test_every_level_of_zero_reads_what_the_others_wrote(tmp_path):
    state = run_in_processes(_save, 2, tmp_path, ParallelConfig(zero=0))[0]
    for zero in (1, 2, 3):
        for _, found in run_in_processes(_load, 2, tmp_path, ParallelConfig(zero=zero)):
            assert_equal(found, state)


def test_a_checkpoint_holds_every_part_of_the_run(tmp_path):
    state = run_in_processes(_save, 1, tmp_path)[0]
    names = {name for name, _ in ToyModel().named_parameters()}
    assert {f"model.{name}" for name in names} | {"model.null_text"} < state.keys()
    for name in names:
        assert {f"ema.{name}", f"optimizer.{name}.exp_avg", f"optimizer.{name}.step"} < state.keys()
    folder = tmp_path / "step-3"
    assert (folder / "config.yaml").read_text() == "toy: true\n"
    manifest = read_manifest(folder)
    assert manifest["step"] == 3
    assert manifest["files"].keys() == {"__0_0.distcp", ".metadata", "config.yaml"}


@pytest.mark.parametrize("world_size", [1, 2])
def test_stopping_and_resuming_changes_no_bit(tmp_path, world_size):
    straight = run_in_processes(train, world_size, tmp_path / "straight", 16)
    for steps in (6, 11, 16):  # each falls back to the last multiple of five
        resumed = run_in_processes(train, world_size, tmp_path / "resumed", steps)
    assert resumed == straight
    lines = [read_metrics(tmp_path / name) for name in ("straight", "resumed")]
    numbers = [[(line["step"], line["skipped"]) for line in one] for one in lines]
    assert numbers[0] == numbers[1]
    assert numbers[0][-1] == (16, 1)


def _sentinel(folder: Path, saves: int):
    """Saves while all values change; the values of checkpoint N are all N."""
    run = build_run(width=64)
    checkpointer = checkpointer_of(run, folder, keep_last=0)
    tensors = [local_part(t) for t in training_state(run.model, run.optimizer, run.ema).values()]
    for step in range(1, saves + 1):
        for tensor in tensors:
            tensor.fill_(step)
        checkpointer.save(step, run.model, run.optimizer, run.ema, {})
        for value in (-1, -2, -3):
            for tensor in tensors:
                tensor.fill_(value)
    checkpointer.close()


def _distinct_values(folder: Path, saves: int):
    run = build_run(width=64)
    found = []
    for step in range(1, saves + 1):
        one = folder / f"only-{step}"
        one.mkdir(parents=True)
        (folder / f"step-{step}").rename(one / f"step-{step}")
        checkpointer = checkpointer_of(run, one)
        checkpointer.resume(run.model, run.optimizer, run.ema)
        checkpointer.close()
        values = set()
        for tensor in run.full().values():
            values |= set(tensor.unique().tolist())
        found.append(values)
    return found


def test_a_checkpoint_holds_one_moment_while_training_goes_on(tmp_path):
    run_in_processes(_sentinel, 2, tmp_path, 12)
    found = run_in_processes(_distinct_values, 1, tmp_path, 12)[0]
    assert found == [{float(step)} for step in range(1, 13)]


def test_only_the_newest_are_kept(tmp_path):
    run_in_processes(train, 1, tmp_path, 22)
    assert steps_saved(tmp_path / "checkpoints") == [20, 15]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-15",
        "step-20",
    ]


def _train_while_reading(folder: Path):
    from longtake.training.checkpoint_folder import reading

    train(folder, 5)
    with reading(folder / "checkpoints" / "step-5"):
        train(folder, 20)
        during = steps_saved(folder / "checkpoints")
    train(folder, 25)
    return during, steps_saved(folder / "checkpoints")


def test_a_checkpoint_that_is_being_read_is_not_deleted(tmp_path):
    assert run_in_processes(_train_while_reading, 1, tmp_path)[0] == ([20, 15, 5], [25, 20])


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    """A folder with checkpoints of steps 5 and 10, written by two processes."""
    folder = tmp_path_factory.mktemp("run")
    run_in_processes(train, 2, folder, 10)
    return folder / "checkpoints"


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero_a_hole(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[500:900] = bytes(400)
    path.write_bytes(data)


def swap_shards(path: Path) -> None:
    other = path.with_name("__1_0.distcp")
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


DAMAGE = {
    "bit": ("__1_0.distcp", flip_a_bit),
    "hole": ("__0_0.distcp", zero_a_hole),
    "truncated": ("__0_0.distcp", lambda path: path.write_bytes(path.read_bytes()[:-10])),
    "missing": ("__1_0.distcp", Path.unlink),
    "link": ("__1_0.distcp", lambda path: (path.unlink(), path.symlink_to("__0_0.distcp"))),
    "swapped": ("__0_0.distcp", swap_shards),
    "metadata": (".metadata", flip_a_bit),
    "document": ("config.yaml", flip_a_bit),
    "manifest": ("manifest.json", lambda p: p.write_text(p.read_text().replace(": 10", ": 11"))),
    "no-manifest": ("manifest.json", Path.unlink),
    "manifest-cut": ("manifest.json", lambda path: path.write_text(path.read_text()[:200])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_named(two_checkpoints, tmp_path, damage, caplog):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    name, inflict = DAMAGE[damage]
    inflict(folder / "step-10" / name)
    assert any(name in text for text in find_damage(folder / "step-10"))
    assert find_damage(folder / "step-5") == []
    with caplog.at_level(logging.ERROR):
        assert latest(folder) == folder / "step-5"
    assert name in caplog.text


def test_every_flipped_bit_is_found(two_checkpoints, tmp_path):
    folder = tmp_path / "step-10"
    shutil.copytree(two_checkpoints / "step-10", folder)
    generator = random.Random(0)
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    for _ in range(200):
        path = generator.choice(files)
        original = path.read_bytes()
        position, bit = generator.randrange(len(original)), generator.randrange(8)
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([original[position] ^ 1 << bit]))
        assert find_damage(folder), f"bit {bit} of byte {position} of {path.name}"
        path.write_bytes(original)
    assert find_damage(folder) == []


def test_resuming_passes_over_a_damaged_checkpoint(two_checkpoints, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    flip_a_bit(folder / "step-10" / "__1_0.distcp")
    extra, _ = run_in_processes(_load, 2, folder)[0]
    assert extra["step"] == 5
    # Out of the way of the run, which will come by this step again.
    assert sorted(path.name for path in folder.iterdir()) == ["step-10.damaged", "step-5"]


def test_all_damaged_is_an_error_and_not_a_fresh_start(two_checkpoints, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    for name in ("step-5", "step-10"):
        flip_a_bit(folder / name / "__0_0.distcp")
    with pytest.raises(AssertionError, match=r"all checkpoints in .* are damaged \(2\)"):
        run_in_processes(_load, 1, folder)
    assert steps_saved(folder) == [10, 5]


def test_a_newer_format_says_so(two_checkpoints, tmp_path):
    from longtake.training import checkpoint_folder

    folder = tmp_path / "step-10"
    shutil.copytree(two_checkpoints / "step-10", folder)
    body = read_manifest(folder) | {"format": 99}
    (folder / "manifest.json").unlink()
    checkpoint_folder.write_manifest(folder, body)
    with pytest.raises(CheckpointError, match="has checkpoint format 99, this version reads 1"):
        read_manifest(folder)


def _failing_saves(folder: Path, on_error: str, break_on: int):
    run = build_run()
    checkpointer = checkpointer_of(run, folder, on_error=on_error)
    arguments = (run.model, run.optimizer, run.ema, {})
    checkpointer.save(1, *arguments)
    checkpointer.wait()
    describe = checkpointer._describe_own_files

    def fail(temporary: Path):
        if temporary.name == "step-2.tmp" and run.mesh.rank == break_on:
            raise OSError(28, "No space left on device")
        return describe(temporary)

    checkpointer._describe_own_files = fail
    checkpointer.save(2, *arguments)
    try:
        checkpointer.save(3, *arguments)
        error = None
    except CheckpointError as caught:
        error = str(caught)
    checkpointer.close()
    return error


@pytest.mark.parametrize("break_on", [0, 1])
def test_a_failed_save_stops_all_processes_at_the_next(tmp_path, break_on):
    for error in run_in_processes(_failing_saves, 2, tmp_path, "stop", break_on):
        assert "the last checkpoint was not saved" in error
        assert f"on rank {break_on}: OSError: [Errno 28] No space left" in error
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_failed_save_can_be_a_warning(tmp_path):
    assert run_in_processes(_failing_saves, 2, tmp_path, "warn", 1) == [None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-3"]


def _bad_saves(folder: Path):
    run = build_run()
    checkpointer = checkpointer_of(run, folder, in_background=False)
    arguments = (run.model, run.optimizer, run.ema, {})
    errors = []

    def attempt(step: int) -> None:
        try:
            checkpointer.save(step, *arguments)
        except CheckpointError as error:
            errors.append(str(error))

    attempt(1)
    attempt(1)
    real_usage = shutil.disk_usage
    shutil.disk_usage = lambda path: real_usage(path)._replace(free=100)
    attempt(2)
    shutil.disk_usage = real_usage
    local_part(run.ema.averages["head.bias"])[0] = float("inf")
    attempt(3)
    checkpointer.close()
    return errors, sorted(path.name for path in folder.iterdir())


def test_what_should_not_be_saved_is_refused(tmp_path):
    (errors, names), _ = run_in_processes(_bad_saves, 2, tmp_path)
    exists, no_space, not_finite = errors
    assert "step-1 exists already: resume from it" in exists
    assert "a checkpoint needs 0.00 GiB and" in no_space
    assert "lower keep_last=3" in no_space
    assert "not finite: ema.head.bias" in not_finite
    assert names == ["step-1"]


def _load_into_another(folder: Path, change: str):
    run = build_run(width=16 if change == "shape" else 8)
    ema: Ema | None = run.ema
    if change == "missing":
        run.model.register_buffer("extra_text", torch.zeros(2))
    if change == "unexpected":
        ema = None
    if change == "dtype":
        assert ema is not None
        ema.averages = {name: value.bfloat16() for name, value in ema.averages.items()}
    before = run.local_digest() if change not in ("dtype",) else None
    checkpointer = checkpointer_of(run, folder)
    try:
        checkpointer.resume(run.model, run.optimizer, ema)
    except CheckpointError as error:
        assert before is None or run.local_digest() == before, "a tensor was touched"
        return str(error)
    finally:
        checkpointer.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", r"model.blocks.0.down.bias is \(8,\) there and \(16,\) here"),
        ("dtype", "ema.blocks.0.down.bias is torch.float32 there and torch.bfloat16 here"),
        ("missing", "it lacks model.extra_text"),
        ("unexpected", "it has ema.blocks.0.down.bias, .* that this run has no place for"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    two_checkpoints, tmp_path, change, message
):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    for text in run_in_processes(_load_into_another, 2, folder, change):
        assert "step-10 does not fit this model" in text
        assert re.search(message, text), text


def test_weights_are_read_without_processes(two_checkpoints):
    model = ToyModel()
    extra = load_weights_for_inference(two_checkpoints / "step-10", model)
    assert extra["step"] == 10
    plain = ToyModel()
    load_weights_for_inference(two_checkpoints / "step-10", plain, ema=False)
    assert torch.equal(model.null_text, plain.null_text)
    assert torch.isfinite(plain.head.weight).all()
    assert not torch.equal(model.head.weight, plain.head.weight)


def test_weights_of_another_size_are_refused(two_checkpoints):
    with pytest.raises(
        CheckpointError, match=r"ema.blocks.0.down.bias is \(8,\) there and \(16,\) here"
    ):
        load_weights_for_inference(two_checkpoints / "step-10", ToyModel(width=16))
    with pytest.raises(CheckpointError, match=r"it has ema.blocks.1"):
        load_weights_for_inference(two_checkpoints / "step-10", ToyModel(depth=1))


def _save_without_ema(folder: Path):
    run = build_run()
    checkpointer = checkpointer_of(run, folder)
    checkpointer.save(1, run.model, run.optimizer, None, {})
    checkpointer.close()


def test_missing_averages_are_named(tmp_path):
    run_in_processes(_save_without_ema, 1, tmp_path)
    with pytest.raises(CheckpointError, match="has no averaged weights"):
        load_weights_for_inference(tmp_path / "step-1", ToyModel())
    load_weights_for_inference(tmp_path / "step-1", ToyModel(), ema=False)


@pytest.mark.slow
def test_kill_during_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path):
    """SIGKILL to all or one of two processes, at random moments of writing; then on from there."""
    generator = random.Random(0)
    folder = tmp_path / "checkpoints"
    seen = []
    for trial in range(6):
        with Processes(train, 2, tmp_path, 10_000, 1, 256) as processes:
            target = max(steps_saved(folder), default=0) + 1
            # Wait until this start has saved once, so that every start makes headway.
            processes.wait_until(lambda: max(steps_saved(folder), default=0) >= target)  # noqa: B023
            processes.wait_until(lambda: bool(list(folder.glob("*.tmp"))))
            time.sleep(generator.random() * 0.05)
            if trial % 3 == 2:
                processes.signal(1, signal.SIGKILL)
                assert processes.exit_codes(20)[0] not in (None, 0), "the survivor stayed"
            processes.kill()
        left = sorted(path.name for path in folder.iterdir())
        seen.append(any(name.endswith(".tmp") for name in left))
        for step in steps_saved(folder):
            assert find_damage(folder / f"step-{step}") == []
    assert any(seen), "no kill fell into a write: the test shows nothing"
    final = steps_saved(folder)[0] + 2
    resumed = run_in_processes(train, 2, tmp_path, final, 1, 256)
    assert run_in_processes(train, 2, tmp_path / "straight", final, 1000, 256) == resumed
    assert not list(folder.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_process_saves_and_stops_all(tmp_path, number):
    with Processes(train_or_exit, 2, tmp_path, 10_000, 10_000) as processes:
        log = tmp_path / "metrics.jsonl"
        processes.wait_until(lambda: log.exists() and len(log.read_text()) > 100)
        processes.signal(1, number)
        start = time.monotonic()
        assert processes.exit_codes(20) == [STOPPED_EXIT_CODE, STOPPED_EXIT_CODE]
        assert time.monotonic() - start < 10
    folder = latest(tmp_path / "checkpoints")
    assert folder is not None
    # Not one step is lost.
    assert read_metrics(tmp_path)[-1]["step"] == read_manifest(folder)["step"]


def test_leftovers_of_an_interrupted_run_are_removed(two_checkpoints, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    for name in ("step-15.tmp", "step-1.deleting"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").write_text("half")
    (folder / "notes.tmp").write_text("not ours")
    extra, _ = run_in_processes(_load, 2, folder)[0]
    assert extra["step"] == 10
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["notes.tmp", "step-10", "step-5"]


def test_an_empty_folder_is_a_fresh_start(tmp_path):
    assert run_in_processes(_load, 1, tmp_path / "none")[0][0] is None
    assert latest(tmp_path / "none") is None
