"""Every kernel compiles for the GPUs it is meant for and stays within what they have."""

import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

# Bytes of shared memory that one program may take.
SHARED = {90: 232_448}


@pytest.mark.compiled
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile_without_spilling_registers(capability: int):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_all_cases", str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert kernels
    for name, taken in kernels.items():
        assert taken["spills"] == 0, name
        assert taken["shared"] <= SHARED[capability], name
