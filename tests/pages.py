"""What README.md and docs/ have from the code and from runs: tables, the demo's output, the picture.

    python -m tests.pages                 the tables that come from the code
    python -m tests.pages --demo --real   also what the demo prints, a picture of its page where Chromium is installed,
                                          and the real model's numbers and picture

writes them anew; with --check, it says what is out of date instead and exits with 1. `make pages` is the second one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from patchkit.cli import COMMANDS
from patchkit.editing.recipe import EditConfig
from patchkit.methods import MethodConfig, available, wrappers
from tests.browser import PROGRAM, browser
from tests.picture import picture

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "assets" / "before_after.svg"
SCREENSHOT = ROOT / "docs" / "assets" / "report.png"
DEMO = ("apply", "examples/facts.jsonl", "--method", "alphaedit", "--out", "out/demo-patch", "--force")
REAL = ("apply", "examples/real_facts.jsonl", "--model", "models/smollm2-135m", "--out", "out/real-patch", "--force")
CHOSEN = ("alphaedit", "oedit+", "adaedit", "mose-right")
"""The methods in the README."""


# --- from the code ----------------------------------------------------------------------------------------------------


def commands() -> str:
    """One row for each command."""
    rows = [f"| `patchkit {name}` | {what} |" for name, what in COMMANDS.items()]
    return "\n".join(["| command | what it does |", "| --- | --- |", *rows])


def _methods(chosen: Mapping[str, Any], prefix: str = "") -> str:
    rows = [
        f"| `{prefix}{name}` | [paper]({one.paper}) | {one.update} | {one.use_when} |" for name, one in chosen.items()
    ]
    return "\n".join(["| `--method` | from | writes | use it when |", "| --- | --- | --- | --- |", *rows])


def few_methods() -> str:
    """The methods that most people choose among."""
    return _methods({name: available()[name] for name in CHOSEN})


def all_methods() -> str:
    """Every method."""
    return _methods(available())


def all_wrappers() -> str:
    """Every wrapper."""
    return _methods(wrappers(), "...+")


def _cell(info: FieldInfo, default: Any) -> str:
    shown = "auto" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return f"{shown} | {info.description or ''}"


def _settings(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in kind.model_fields.items():
        default = info.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from _settings(type(default), f"{prefix}{name}.")
        elif name not in ("method", "settings"):
            yield f"| `{prefix}{name}` | {_cell(info, default)} |"


def settings() -> str:
    """Every key of a recipe but the methods' own."""
    return "\n".join(["| key | default | |", "| --- | --- | --- |", *_settings(EditConfig)])


def method_settings() -> str:
    """Every setting of every method and wrapper."""
    kinds: dict[str, type[MethodConfig]] = {name: one.config for name, one in available().items()}
    kinds |= {f"+{name}": one.config for name, one in wrappers().items()}
    rows = [
        f"| `{name}` | `{f'{name[1:]}.' if name.startswith('+') else 'settings.'}{key}` | {_cell(info, info.default)} |"
        for name, kind in kinds.items()
        for key, info in kind.model_fields.items()
    ]
    return "\n".join(["| method | key | default | |", "| --- | --- | --- | --- |", *rows])


# --- from runs --------------------------------------------------------------------------------------------------------


def _patchkit(*arguments: str) -> str:
    """What `patchkit ARGS...` prints on a wide terminal, without the spaces at the ends of lines."""
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "patchkit", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


def demo() -> str:
    """The table of `make demo`, up to the line that says where the patch is."""
    return f"```\n{_patchkit(*DEMO).rpartition('patch: ')[0].strip()}\n```"


def real() -> tuple[str, str]:
    """The real model's numbers as a sentence, and the picture of them."""
    from patchkit.evaluate.metrics import summary_line
    from patchkit.evaluate.report import Report

    printed = json.loads(_patchkit(*REAL, "--json"))
    report = Report.model_validate({name: printed[name] for name in Report.model_fields if name in printed})
    return f"{summary_line(report)}.", picture(report)


# --- into the pages ---------------------------------------------------------------------------------------------------

BLOCKS: dict[str, tuple[str, Callable[[], str]]] = {
    "commands": ("README.md", commands),
    "few methods": ("README.md", few_methods),
    "all methods": ("docs/methods.md", all_methods),
    "all wrappers": ("docs/methods.md", all_wrappers),
    "settings": ("docs/recipes.md", settings),
    "method settings": ("docs/recipes.md", method_settings),
}


def held(page: str, name: str) -> str:
    """What a page has in a block."""
    found = _block(name).search((ROOT / page).read_text(encoding="utf-8"))
    assert found, f"{page} has no block called {name}"
    return found[2].strip("\n")


def put(page: str, name: str, text: str) -> None:
    """Replace a block of a page."""
    file = ROOT / page
    before = file.read_text(encoding="utf-8")
    file.write_text(_block(name).sub(lambda found: f"{found[1]}{text}\n{found[3]}", before), encoding="utf-8")


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: [^\n]*-->\n\n?)(.*?)(<!-- end -->)", re.DOTALL)


NUMBER = re.compile(r"(?<![\d.#a-wyzA-Z])-?\d[\d,]*(?:\.\d+)?%?")


def differences(written: str, found: str, lines: int = 0) -> list[str]:
    """Lines that tell something else than what was found, numbers with a decimal point aside that another processor
    may round into: shares may differ by 17 points, others by 30 %. `lines` of them are forgiven."""
    before, now = written.splitlines(), found.splitlines()
    if len(before) != len(now):
        return [f"{len(before)} lines, now {len(now)}"]
    told = [f"{old}\n  now: {new}" for old, new in zip(before, now, strict=True) if not _alike(old, new)]
    return told if len(told) > lines else []


def _alike(old: str, new: str) -> bool:
    words = [" ".join(part.split()) for part in (NUMBER.sub("#", old), NUMBER.sub("#", new))]
    pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=False)
    return words[0] == words[1] and all(_near(*pair) for pair in pairs)


def _near(old: str, new: str) -> bool:
    if "." not in old:
        return old == new
    a, b = (float(number.rstrip("%").replace(",", "")) for number in (old, new))
    return abs(a - b) <= (17 if old.endswith("%") else 0.01 + 0.3 * max(abs(a), abs(b)))


def stale(with_demo: bool, with_real: bool) -> list[str]:
    """What in the pages is out of date."""
    problems = [f"{page}: {name}" for name, (page, make) in BLOCKS.items() if held(page, name) != make()]
    if with_demo:  # facts near the edge of holding may fall to either side on another processor
        found = differences(_ticks(held("README.md", "demo")), _ticks(demo()), lines=3)
        problems += [f"README.md: demo: {line}" for line in found]
    if with_real:
        sentence, drawn = real()
        problems += [f"README.md: real: {line}" for line in differences(held("README.md", "real"), sentence)]
        written = PICTURE.read_text(encoding="utf-8")
        problems += [f"{PICTURE.name}: {line}" for line in differences(written, drawn, lines=3)]
    return problems


def _ticks(table: str) -> str:
    """The table without the lines below it that say why facts do not hold."""
    return re.sub(r"(?ms)^✗ .*?\n\n", "", table)


def write(with_demo: bool, with_real: bool) -> None:
    """Write everything anew."""
    for name, (page, make) in BLOCKS.items():
        put(page, name, make())
    if with_demo:
        put("README.md", "demo", demo())
        screenshot()
    if with_real:
        sentence, drawn = real()
        put("README.md", "real", sentence)
        PICTURE.write_text(drawn, encoding="utf-8")


def screenshot() -> None:
    """The top of the demo's page with its first fact open, as a browser shows it."""
    if PROGRAM is None:
        print(f"{SCREENSHOT.relative_to(ROOT)} stays as it is: it takes Chromium, which is not here")
        return
    with TemporaryDirectory() as profile, browser(Path(profile)) as page:
        page.open(ROOT / "out" / "demo-patch" / "report.html", width=1200, height=1180)
        page.run("document.querySelector('.fact').open = true; new Promise((done) => setTimeout(done, 200))")
        page.picture(SCREENSHOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="what `make demo` prints, too (half a minute)")
    parser.add_argument("--real", action="store_true", help="the real model's numbers, too (`make models` fetches it)")
    parser.add_argument("--check", action="store_true", help="say what is out of date, and write nothing")
    given = parser.parse_args()
    if not given.check:
        write(given.demo, given.real)
    elif problems := stale(given.demo, given.real):
        sys.exit("\n".join([*problems, "`python -m tests.pages` writes them anew; see --help"]))


if __name__ == "__main__":
    main()
