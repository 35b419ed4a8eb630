"""The README is short and up to date, the site builds without network or warnings and asks a browser for nothing."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote, urlsplit

import click
import pytest

from patchkit.cli import cli
from patchkit.evaluate.report import Why
from patchkit.facts.schema import Fact
from patchkit.maths.updates import KINDS
from patchkit.patch.manifest import BaseInfo, EditedFact, Manifest, Run, UpdateInfo
from tests import pages
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_tables_that_come_from_the_code_are_up_to_date() -> None:
    assert pages.stale(with_demo=False, with_real=False) == [], "`python -m tests.pages` writes them anew"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_outside_of_the_site_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


def shown_commands() -> list[tuple[str, str]]:
    """Every `patchkit ...` in a block for a shell, with the page it stands on."""
    found = []
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```sh\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(file.name, line) for line in lines if re.match(r"(\.venv/bin/)?patchkit ", line)]
    return found


def test_every_command_that_a_page_shows_is_one() -> None:
    shown = shown_commands()
    assert len(shown) > 15
    whole = click.Context(cli, **cli.context_settings)  # a command keeps the -h of the first one that it sees
    for page, line in shown:
        name, *arguments = shlex.split(line, comments=True)[1:]
        command = cli.get_command(whole, name)
        assert command, f"{page}: {line}"
        try:
            command.make_context(name, arguments, parent=whole)
        except click.UsageError as error:
            pytest.fail(f"{page}: {line}: {error.format_message()}")


def test_what_differs_between_processors_is_forgiven_and_nothing_else() -> None:
    written = "asked  97.2%  36 answers\nratio  x1.0019  4.035 -> 4.043\nBale has  lawyer.  4 of 4 hold"
    assert pages.differences(written, written.replace("97.2%", "91.7%").replace("1.0019", "1.0031")) == []
    assert pages.differences(written, written.replace("  36", " 36")) == []
    assert len(pages.differences(written, written.replace("97.2%", "61.1%"))) == 1
    assert len(pages.differences(written, written.replace("36", "48"))) == 1
    assert len(pages.differences(written, written.replace("asked", "said"))) == 1
    assert pages.differences(written, f"{written}\nanother line")
    assert pages.differences(written, written.replace("lawyer", "baker"), lines=1) == []


# --- the patch format -------------------------------------------------------------------------------------------------

FORMAT = (ROOT / "docs" / "patch_format.md").read_text(encoding="utf-8")


def fields_under(heading: str) -> list[str]:
    """The first cells of the table under a heading."""
    section = re.split(r"^##+ ", FORMAT.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


@pytest.mark.parametrize(
    ("heading", "kind", "inherited"),
    [
        ("manifest.json", Manifest, ()),
        ("base", BaseInfo, ()),
        ("facts", EditedFact, EditedFact.__base__.model_fields),
        ("updates", UpdateInfo, ()),
        ("history", Run, ()),
    ],
)
def test_the_page_on_the_format_has_every_field(heading: str, kind: type, inherited: tuple[str, ...]) -> None:
    wanted = [name for name in kind.model_fields if name not in inherited]
    assert fields_under(heading) == wanted, f"docs/patch_format.md, {heading}"


def test_the_questions_have_every_reason_why_a_fact_does_not_hold() -> None:
    page = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    kinds = get_args(Why.model_fields["kind"].annotation)
    assert kinds
    assert [kind for kind in kinds if f"- **{kind.capitalize()}**" not in page] == []
    lost = ("learned, but lost among the", "learned, but not kept")  # which are one kind, and differ in why
    assert [words for words in lost if f'- **Lost** ("{words}' not in page] == []


def test_the_page_on_facts_has_every_field() -> None:
    page = (ROOT / "docs" / "facts.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(Fact.model_fields)


def test_the_page_on_the_format_has_every_part_of_every_update() -> None:
    rows = dict(
        re.findall(r"^\| `(\w+)` \| (.+?) \|", FORMAT.partition("## Tensors")[2].partition("## ")[0], re.MULTILINE)
    )
    assert list(rows) == list(KINDS)
    for name, kind in KINDS.items():
        parts = [part for part in kind.__dataclass_fields__ if part != "side"]
        assert sorted(re.findall(r"`(\w+)`", rows[name])) == sorted(parts)


# --- the site ---------------------------------------------------------------------------------------------------------

OFFLINE = """
import socket
def refuse(*args, **kwargs):
    raise OSError("building the site opened a connection")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""


class Page(HTMLParser):
    """What a page loads, what it links to, and the places in it that can be linked to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads, self.links, self.places = list[str](), list[str](), {"", "__top"}
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given["href"])
        elif "src" in given:
            self.loads.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: every warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", OFFLINE, "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages_of_it = {file: Page(file) for file in site.rglob("*.html")}
    assert len(pages_of_it) > 20
    assert [(file.name, url) for file, page in pages_of_it.items() for url in page.loads if "//" in url] == []
    styles = [file for file in site.rglob("*.css") if re.search(r"url\(['\"]?(?:https?:)?//", file.read_text("utf-8"))]
    assert styles == []


def test_every_link_on_the_site_leads_somewhere(site: Path) -> None:
    pages_of_it = {file.resolve(): Page(file) for file in site.rglob("*.html")}
    broken = []
    for file, page in pages_of_it.items():
        for link in page.links:
            to = urlsplit(link)
            if to.scheme or to.netloc or file.name == "404.html":
                continue
            target = (file.parent / unquote(to.path)).resolve() if to.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (
                target in pages_of_it and unquote(to.fragment) not in pages_of_it[target].places
            ):
                broken.append(f"{file.name}: {link}")
    assert broken == []


def test_the_picture_has_a_fallback_font_and_text(site: Path) -> None:
    for name in ("before_after.svg", "flow.svg"):
        drawn = (site / "assets" / name).read_text(encoding="utf-8")
        assert "sans-serif" in drawn
        assert "aria-label=" in drawn
        assert "<text" in drawn


# --- against runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_readme_has_what_the_demo_prints() -> None:
    assert pages.stale(with_demo=True, with_real=False) == [], "`python -m tests.pages --demo` writes it anew"


@pytest.mark.slow
def test_the_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    session: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), session)
    assert session["report"].efficacy.success == 1.0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_readme_and_the_picture_have_what_the_real_model_does() -> None:
    if not (ROOT / "models" / "smollm2-135m" / "config.json").is_file():
        pytest.skip("no models/smollm2-135m: `make models` fetches it")
    assert pages.stale(with_demo=False, with_real=True) == [], "`python -m tests.pages --real` writes them anew"
