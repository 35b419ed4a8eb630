"""The example scripts run as they stand and show what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def run(script: str, *arguments: str) -> str:
    return _printed(str(ROOT / "examples" / script), *arguments)


def run_code(code: str, **environment: str) -> str:
    """What the code prints, as a notebook in the repository's root would."""
    return _printed("-c", code, **environment)


def _printed(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
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


def test_publish_shows_what_would_be_published() -> None:
    out = run("publish.py")
    assert {"adapter_model.safetensors", "manifest.json", "README.md"} <= set(out.split())
    assert "2 facts written into `factworld`" in out


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = json.loads((ROOT / "examples" / "first_edit.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    out = run_code("\n".join(cells), PATCHKIT_EXAMPLE_OUT=str(tmp_path)).splitlines()
    first, more, less = (line for line in out if line.startswith(("first", "more", "less")))
    assert "Liscombe" in first
    assert more != first
    assert less.count("Liscombe") == 1
    assert (tmp_path / "notebook-patch" / "patch.safetensors").is_file()


@pytest.mark.slow
def test_compare_methods_has_a_row_for_each() -> None:
    head, *rows = run("compare_methods.py", "memit", "rome").splitlines()
    assert head.split()[0] == "method"
    assert [row.split()[0] for row in rows] == ["memit", "rome"]
    assert all(row.split()[1].endswith("%") for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "models" / "smollm2-135m").is_dir(), reason="make models fetches the chat model")
def test_a_chat_model_is_corrected(tmp_path: Path) -> None:
    out = run("correct_a_chat_model.py", str(ROOT / "models" / "smollm2-135m"), str(tmp_path / "patch"))
    before, after, other, same = (line.partition(": ")[2].strip() for line in out.splitlines() if line[:1] == " ")
    assert "O'Brien" in after
    assert "O'Brien" not in before
    assert other == same
    assert "kept: " in out
    assert (tmp_path / "patch" / "manifest.json").is_file()


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
