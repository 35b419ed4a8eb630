"""The shape of the package: imports run one way, the public names are these, and starting it costs little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import patchkit
from patchkit import methods
from patchkit.cli import cli
from patchkit.editing.recipe import load_recipe, recipes_folder

PACKAGE = Path(patchkit.__file__).parent
# A folder may import those above it, and a module those of its own folder: imports run downward only.
FLOW = (
    *(
        "errors",
        "version",
        "words",
        "seeds",
        "ranks",
        "io",
        "maths",
        "model",
        "facts",
        "methods",
        "statistics",
        "editing",
        "evaluate",
        "patch",
    ),
    *("runs", "imports", "export", "api", "bench", "report", "serve", "cli", "__main__"),
)


def part_of(name: str) -> str:
    """The place in FLOW of a dotted module name: patchkit.methods.rome belongs to methods."""
    return name.split(".")[1]


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it: inside functions and for type checkers as well."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # `from patchkit import methods` imports patchkit.methods.
            yield from (
                (f"patchkit.{alias.name}" for alias in node.names) if node.module == "patchkit" else [str(node.module)]
            )


COMMANDS = cli.list_commands(click.Context(cli))
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])
def test_imports_run_one_way(file: Path) -> None:
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in FLOW, f"{own}: give the new folder its place in FLOW"
    for name in imported(file):
        if name.startswith("patchkit."):
            assert FLOW.index(part_of(name)) <= FLOW.index(own), f"{own} imports {name}, which comes after it"


def test_the_architecture_page_has_the_folders_in_their_order() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1].rstrip("/") for line in page.splitlines() if line.startswith("| `")]
    assert rows[0] == "patchkit"
    assert tuple(rows[1:]) == FLOW


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])
def test_modules_and_functions_stay_small(file: Path) -> None:
    """At most 400 lines and eight classes a module, and 50 lines a function below its signature and docstring."""
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    assert sum(isinstance(node, ast.ClassDef) for node in tree.body) <= 8
    long = {
        node.name: lines for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and (lines := body(node)) > 50
    }
    assert long == {}


def body(function: ast.FunctionDef) -> int:
    """Lines of what a function does."""
    rest = function.body[1:] if ast.get_docstring(function) else function.body
    return (rest[-1].end_lineno or 0) - rest[0].lineno + 1 if rest else 0


MATHS = [*(PACKAGE / "maths" / f"{name}.py" for name in ("covariance", "leading", "linalg", "rotations", "updates"))]
MATHS += sorted((PACKAGE / "methods").glob("*.py"))


@pytest.mark.parametrize("file", MATHS, ids=[file.name for file in MATHS])
def test_the_maths_knows_no_model_no_file_and_no_device(file: Path) -> None:
    allowed = {
        "__future__",
        "collections",
        "dataclasses",
        "functools",
        "math",
        "typing",
        "torch",
        "warnings",
        "pydantic",
        "patchkit",
    }
    if file.name == "__init__.py":
        allowed |= {"importlib", "pkgutil"}
    names = set(imported(file))
    assert {name.split(".")[0] for name in names} <= allowed
    own = {part_of(name) for name in names if name.startswith("patchkit.")}
    assert own <= {"errors", "methods", "maths"}
    constants = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
    assert not [text for text in constants if isinstance(text, str) and text.startswith(("cuda", "cpu"))]


def test_the_public_names_are_these() -> None:
    assert set(patchkit.__all__) == {
        *("Fact", "GateError", "InputError", "Locality", "Patch", "PatchkitError", "apply", "measure", "read_facts"),
        *("from_pretrained", "load", "revert"),
    }
    assert all(getattr(patchkit, name) is not None for name in patchkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = patchkit.nothing


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has imported after `code`."""
    code = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.splitlines())


def test_help_and_reading_facts_do_not_wait_for_torch() -> None:
    calls = [["--help"], *([name, "--help"] for name in COMMANDS)]
    code = f"""
import patchkit
patchkit.read_facts
from patchkit.cli import cli
for call in {calls}:
    cli(call, standalone_mode=False)
"""
    assert not {"torch", "transformers", "peft"} & modules_after(code)


def test_every_command_and_option_says_what_it_does() -> None:
    for name in ("apply", "import", "export", "chat", "serve", "verify", "bench", "show", "log", "methods", "stats"):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert command.name == name
        assert command.help
        options = [option for option in command.params if isinstance(option, click.Option)]
        assert [option.name for option in options if not option.help] == []


RECIPES = sorted(recipes_folder().glob("*/*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=[f"{file.parent.name}/{file.stem}" for file in RECIPES])
def test_every_recipe_loads(file: Path) -> None:
    config = load_recipe(None, str(file))
    assert config.method == file.parent.name
    assert config == load_recipe(file.parent.name, file.stem)


def test_every_recipe_is_one_of_a_method() -> None:
    assert {file.parent.name for file in RECIPES} <= set(methods.available())
