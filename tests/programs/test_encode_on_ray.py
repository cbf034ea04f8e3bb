"""`longtake encode --engine ray`: a real Ray of several processes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longtake.store import (
    ClusterError,
    Encoding,
    Job,
    content_of,
    file_keys,
    missing_work,
    read_catalog,
)
from longtake.store.cluster import _counted_start, _from_row, _to_row
from tests.programs.runs import longtake, longtake_in, python_m_longtake, save_config, tiny_config
from tests.programs.stores import ONE_SAMPLE, encode_here, files_of, make_many_clips

COUNT = 80
TWO = ("--ray-workers", "2")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Clips, and one that is no video: failures travel, too."""
    folder = tmp_path_factory.mktemp("ray")
    manifest = make_many_clips(folder / "clips", COUNT)
    manifest.with_name("text.mp4").write_text("not a video\n" * 100)
    with open(manifest, "a") as file:
        file.write(json.dumps({"path": "text.mp4", "caption": "number 0"}) + "\n")
    return tiny_config(folder, manifest)


def _workers(driver: int) -> list[int]:
    """The processes that encode for a run, which Ray's own one has started."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            after_name = folder.joinpath("stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(after_name[1])
            if folder.joinpath("cmdline").read_bytes().startswith(b"ray::MapWorker"):
                found.append(int(folder.name))
    return [pid for pid in found if parents.get(parents.get(pid, 0)) == driver]


@pytest.mark.services
def test_a_worker_is_killed_and_the_store_is_as_if_it_had_not_been(tmp_path, config):
    expected, store = tmp_path / "expected", tmp_path / "store"
    assert encode_here(config, expected, *ONE_SAMPLE) == 0
    arguments = ["encode", "--config", save_config(config), "--output", store, *ONE_SAMPLE]
    command = python_m_longtake(*arguments, "--disk-budget", "1GB", "--engine", "ray", *TWO)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        deadline = time.monotonic() + 120
        while len(done := list(store.glob("shards/clips-*"))) < 5:
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        victim, *others = _workers(run.pid)
        os.kill(victim, signal.SIGKILL)
        assert others, "one of several"
        out, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    assert len(done) < COUNT, "it was at work when it was killed"
    shards = {name: raw for name, raw in files_of(expected).items() if name.startswith("shards")}
    assert len(shards) > COUNT
    files = files_of(store)
    assert {name: files[name] for name in files if name.startswith("shards")} == shards
    assert files.keys() - shards.keys() == {
        "rates.json",
        "store.json",
        *(name for name in files if name.startswith("index-")),
    }
    assert re.search(r"Ray: 1 machine\(s\), \d+ worker\(s\) with 1 CPU\(s\) each", out)
    total = 2 * COUNT + 1  # the clip that is none has the caption of another one
    assert f"{total}/{total} · " in out
    assert " items/s · 0:00 left · " in out
    assert "kB written · failed: 1 unreadable" in out
    assert f"holds {COUNT} clips and {COUNT} captions" in out
    assert "text.mp4 (line 81)" in out
    assert "break-even" in out


@pytest.mark.services
def test_a_cluster_that_is_not_there_is_an_error(tmp_path, config):
    arguments = ["encode", "--config", save_config(config), "--output", tmp_path / "store"]
    arguments += ["--engine", "ray", "--ray-address", "auto"]
    outcome = longtake(*arguments)
    assert outcome.status == 1, outcome.err
    assert "error: no Ray at auto: ConnectionError" in outcome.err


def _hide_ray() -> None:
    sys.modules["ray"] = None  # type: ignore[assignment]


def test_without_ray_it_says_what_to_install(tmp_path, config):
    arguments = ["encode", "--config", save_config(config), "--output", tmp_path / "store"]
    outcome = longtake(*arguments, "--engine", "ray", before=_hide_ray)
    assert outcome.status == 2, outcome.err
    assert "--engine ray needs Ray Data" in outcome.err
    assert "pip install 'longtake[ray]'" in outcome.err


def test_what_does_not_go_together_is_named(tmp_path, config):
    arguments = ["encode", "--config", save_config(config), "--output", tmp_path / "store"]
    for more, problem in (
        (["--ray-workers", 2], "--ray-address and --ray-workers have no effect without --engine"),
        (["--engine", "ray", "--ray-workers", -1], "--ray-workers -1 must be 0 (all there is) or"),
    ):
        outcome = longtake(*arguments, *more)
        assert outcome.status == 2, outcome.err
        assert problem in outcome.err
    outcomes = longtake_in(2, *arguments, "--engine", "ray")
    assert "do not start it with torchrun" in outcomes[0].err


def test_a_list_that_kills_workers_ends_the_run(tmp_path, config):
    """What a worker does when Ray gives it a list over which others have died."""
    job = Job(
        store=tmp_path / "store",
        data=config.data,
        video=config.video_encoder,
        text=config.text_encoder,
        seed=config.seed,
        latents="bf16",
    )
    encoding = Encoding(job, torch.device("cpu"))
    keys, failures = file_keys(encoding.manifest, "sha256")
    content = content_of(encoding.manifest, encoding.recipe, keys, failures)
    work = missing_work(content, encoding.recipe, read_catalog(job.store), shard_bytes=2**20)
    item = next(item for item in work if item.kind == "clips")
    assert _from_row(_to_row(item)).name == item.name
    for name in ("sample_ids", "missing", "keys"):
        assert (getattr(_from_row(_to_row(item)), name) == getattr(item, name)).all()

    (tmp_path / "store/shards").mkdir(parents=True)
    with _counted_start(encoding, item):
        pass
    assert not list((tmp_path / "store/claims").iterdir()), "what is done is not counted"
    starts = tmp_path / f"store/claims/clips-{item.name}.starts"
    starts.write_bytes(b"....")
    problem = r"4 workers have died over one list: clips of 81 samples \(0.mp4, 1.mp4, 2.mp4, "
    with pytest.raises(ClusterError, match=problem), _counted_start(encoding, item):
        pass
    assert not starts.exists()
