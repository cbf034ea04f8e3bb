from __future__ import annotations

import os
import subprocess
import sys

import pytest

from longtake.training import FolderInUseError, hold_run_folder

HOLDER = """
import sys, time
from pathlib import Path
from longtake.training import hold_run_folder
with hold_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_told_who_has_the_folder(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(
                FolderInUseError, match=rf"in use by process {holder.pid} on .*, started 20"
            ),
            hold_run_folder(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    # The lock dies with its holder, however that died.
    with hold_run_folder(tmp_path):
        pass


def test_a_lock_without_a_name_is_still_a_lock(tmp_path):
    with hold_run_folder(tmp_path):
        os.truncate(tmp_path / ".lock", 0)
        with (
            pytest.raises(FolderInUseError, match="another run that left no name"),
            hold_run_folder(tmp_path),
        ):
            pass
