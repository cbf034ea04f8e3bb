"""The files of `deploy/` and the commands of docs/many-machines.md: what they start would start."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from longtake.config.command_line import parse_train
from longtake.parallel.mesh import resolve_degrees

ROOT = Path(__file__).parent.parent
GPUS = 64


def _in_slurm() -> str:
    lines = (ROOT / "deploy/slurm.sh").read_text().replace("\\\n", " ")
    match = re.search(r"^ *run (train .*)$", lines, flags=re.MULTILINE)
    assert match
    return match[1]


def _in_kubernetes() -> str:
    _, job = yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text())
    shell, option, command = job["spec"]["trainer"]["command"]
    assert (shell, option) == ("bash", "-c")
    return command


def _in_docs() -> list[str]:
    text = (ROOT / "docs/many-machines.md").read_text().replace("\\\n", " ")
    return re.findall(r"^(torchrun .* -m longtake .*)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "command", [_in_slurm(), _in_kubernetes(), *_in_docs()], ids=lambda text: text[:30]
)
def test_the_command_parses_and_fills_the_machines(command):
    before, _, rest = command.rpartition("train ")
    if "torchrun" in before:
        values = before.partition("torchrun ")[2].replace("$PET_NNODES", "8")
        options = get_args_parser().parse_args([*shlex.split(values), "train"])
        assert options.rdzv_backend == "c10d"
        assert options.max_restarts == 3
        assert (options.module, options.training_script) == (True, "longtake")
    config = parse_train(shlex.split(rest)).config
    replicas, shards = resolve_degrees(config.parallel, GPUS)
    assert replicas * shards * config.parallel.sp == GPUS
    assert config.data.buckets[0].batch_size % (replicas * shards) == 0


def test_slurm_script_is_bash_and_queues_again_what_was_stopped(tmp_path):
    script = ROOT / "deploy/slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    # Slurm's commands as far as the script knows them: processes that end as told, in turn.
    commands = {
        "scontrol": 'if [ "$1" = show ]; then echo first; else echo "$@"; fi',
        "srun": 'shift 2; SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=64 "$@"',
        "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR: $@" >> asked;'
        ' status=$(head -n 1 ends); sed -i 1d ends; exit "$status"',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n", "HOME": "/"}
    environment["SLURM_JOB_ID"] = "123456"

    def run(*ends):
        (tmp_path / "ends").write_text("".join(f"{end}\n" for end in ends))
        return subprocess.run(
            ["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = run(1, 137, 0)
    assert done.returncode == 0
    assert "attempt 1 ended with status 137" in done.stdout
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 3
    assert asked[0].startswith("3 1 64 first: -m longtake train --preset stdit-xl2-16x256")
    assert "requeue 123456" in run(75).stdout
    assert run(2).returncode == 2
    assert run(1, 1, 1, 1, 0).returncode == 1


def test_kubernetes_manifest_names_its_own_runtime():
    runtime, job = yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text())
    assert job["apiVersion"] == runtime["apiVersion"]
    reference = job["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    mounts = pod["spec"]["containers"][0]["volumeMounts"]
    assert {mount["name"] for mount in mounts} == volumes
    trainer = job["spec"]["trainer"]
    assert trainer["numNodes"] * trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == GPUS
