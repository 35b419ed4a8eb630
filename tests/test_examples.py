"""The example scripts run as they stand and show what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_edit_and_compare_shows_the_new_answer_beside_the_old() -> None:
    lines = run("edit_and_compare.py").splitlines()
    assert len(lines) == 6
    for base, patched in zip(lines[1::3], lines[2::3], strict=True):
        assert base.split()[1] != patched.split(":")[1].split()[0]


def test_save_and_load_measures_the_loaded_patch(tmp_path: Path) -> None:
    out = run("save_and_load.py", str(tmp_path / "patch"))
    assert "manifest.json" in out
    assert "3 facts" in out
    assert (tmp_path / "patch" / "patch.safetensors").is_file()


def test_stack_patches_shows_each_state() -> None:
    out = run("stack_patches.py")
    assert "disabled:" in out
    assert out.rstrip().endswith("every weight is bit for bit as it was: True")
