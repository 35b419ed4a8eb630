"""The wheel: its name is its own, it holds what a checkout holds beside the package, and patchkit runs from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

import patchkit
from patchkit.version import DISTRIBUTION

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_name_is_the_one_that_the_version_is_asked_for_by(unpacked: Path) -> None:
    (folder,) = unpacked.glob("*.dist-info")
    metadata = Parser().parsestr((folder / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Name"] == DISTRIBUTION
    # On the package index, `patchkit` belongs to another project.
    assert DISTRIBUTION != "patchkit"
    assert "patchkit = patchkit.__main__:main" in (folder / "entry_points.txt").read_text(encoding="utf-8")


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("checkout", "packaged"),
    [
        ("recipes", "recipes"),
        ("patchkit/data", "data"),
        ("examples/factworld", "examples/factworld"),
    ],
)
def test_recipes_texts_and_the_embedded_model_are_in_it(unpacked: Path, checkout: str, packaged: str) -> None:
    held = files_under(unpacked / "patchkit" / packaged)
    assert held == files_under(ROOT / checkout)
    assert held


def test_the_facts_of_the_demo_and_the_type_marker_are_in_it(unpacked: Path) -> None:
    package = unpacked / "patchkit"
    assert (package / "examples/facts.jsonl").read_bytes() == (ROOT / "examples/facts.jsonl").read_bytes()
    assert (package / "py.typed").is_file()


def test_it_runs_and_finds_its_recipes_without_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import patchkit\n"
        "from patchkit.editing.recipe import load_recipe, recipes_folder\n"
        "from patchkit.version import patchkit_version\n"
        "print(patchkit.__file__, recipes_folder(), load_recipe('memit').method, patchkit_version(), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    package = unpacked / "patchkit"
    (folder,) = unpacked.glob("*.dist-info")
    version = folder.name.removesuffix(".dist-info").rpartition("-")[2]
    assert done.stdout.splitlines() == [str(package / "__init__.py"), str(package / "recipes"), "memit", version]


def test_installed_into_an_empty_environment_it_edits_the_embedded_model(wheel: Path, tmp_path: Path) -> None:
    """As a user has it: by pip, without the checkout. Its dependencies, which no network is there for, are lent."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "install", "--no-index", "--no-deps", str(wheel)], check=True, capture_output=True, timeout=120
    )
    (installed,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (installed / "lent.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PATCHKIT"))}
    environment |= {"PATCHKIT_CACHE": str(tmp_path / "cache")}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(str(python), "-c", "import patchkit; print(patchkit.__file__)") == f"{installed}/patchkit/__init__.py\n"
    fact = "Pine Kelmel was born in the city of | Pine Kelmel | Liscombe"
    command = str(python.with_name("patchkit"))
    made = json.loads(run(command, "apply", "--fact", fact, "--quick", "--out", "first-patch", "--json"))
    assert made["efficacy"]["exact"] == 1.0
    manifest = patchkit.Patch.load(tmp_path / "first-patch").manifest
    assert Path(manifest.base.name).name == "factworld"
    assert run(command, "--version").split()[-1] == manifest.history[0].versions["patchkit"]
