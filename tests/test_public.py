"""What `import patchkit` gives: a short list of names, each with a docstring that says all, and examples that run."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import patchkit
from patchkit.patch.stack import PatchStack
from tests.conftest import ROOT

NAMES = dir(patchkit)
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(patchkit, name))]
CLASSES = [name for name in NAMES if inspect.isclass(getattr(patchkit, name))]


def described(name: str) -> str:
    return inspect.cleandoc(getattr(patchkit, name).__doc__ or "")


def test_dir_has_the_public_names_and_nothing_else() -> None:
    code = "import patchkit, patchkit.cli; print(sorted(patchkit.__all__) == dir(patchkit))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "True\n"
    assert sorted([*FUNCTIONS, *CLASSES]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>> " in described(name).partition("Examples:")[2]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    text = described(name)
    taken = [part for part in ("Args:", "Returns:", "Raises:") if f"\n{part}\n" in text]
    assert taken == ["Args:", "Returns:", "Raises:"]
    arguments = text.partition("Args:\n")[2].partition("\nReturns:")[0]
    named = re.findall(r"^    (\w+): ", arguments, re.MULTILINE)
    assert named == list(inspect.signature(getattr(patchkit, name)).parameters)


@pytest.mark.parametrize("owner", [patchkit.Patch, patchkit.Fact, PatchStack])
def test_every_public_method_has_a_docstring(owner: type) -> None:
    own = {name: member for name, member in vars(owner).items() if not name.startswith(("_", "model_"))}
    methods = {name: member for name, member in own.items() if callable(member) or isinstance(member, property)}
    assert [name for name, member in methods.items() if not (member.__doc__ or "").strip()] == []
    assert methods


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one session, as they say: `apply` makes the model and the patch that the others speak of."""
    monkeypatch.chdir(ROOT)
    session: dict[str, Any] = {"patchkit": patchkit, "folder": tmp_path / "patch"}
    order = ["apply", "measure", "Patch", *NAMES]
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for name in dict.fromkeys(order):
        test = doctest.DocTestParser().get_doctest(described(name), session, name, None, 0)
        assert test.examples
        test.globs = session  # which get_doctest copies
        assert runner.run(test, clear_globs=False).failed == 0, name
