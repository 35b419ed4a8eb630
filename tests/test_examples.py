"""The example scripts run as they stand and show what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_serve_with_llama_writes_what_llama_cpp_loads(tmp_path: Path) -> None:
    out = run("serve_with_llama.py", str(tmp_path / "gguf"))
    assert f"llama-server -m BASE.gguf --lora {tmp_path / 'gguf'}/adapter.gguf" in out
    assert "ADAPTER ./adapter.gguf" in out
    assert (tmp_path / "gguf" / "adapter.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.slow
def test_continue_a_patch_adds_supersedes_and_reverts(tmp_path: Path) -> None:
    *said, history = run("continue_a_patch.py", str(tmp_path / "theirs")).splitlines()
    by_patch = {name: [line for line in said if line.startswith(name)] for name in ("theirs", "with ours", "less one")}
    assert "Liscombe" in by_patch["theirs"][0]
    assert all("Pelwick" in by_patch[name][0] for name in ("with ours", "less one"))
    assert by_patch["with ours"][1].partition(": ")[2] != by_patch["less one"][1].partition(": ")[2]
    assert history == "history: apply 1, apply 2, revert 1"
