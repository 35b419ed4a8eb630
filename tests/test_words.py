"""Numbers and names in sentences; American spelling, as in the ecosystem; and no page that sends a reader to a package
index."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from patchkit.words import agreeing, in_short, listed

ROOT = Path(__file__).parents[1]

BRITISH = re.compile(
    r"(?i)(?:"
    r"(?:behavi|col|fav|flav|harb|hon|hum|lab|neighb)our"
    r"|(?:anal|catal|paral)ys(?:e|ed|ing)(?![a-z])"
    r"|(?:capital|character|custom|equal|factor|final|general|initial|linear|material|maxim|memor|minim|normal|optim"
    r"|organ|orthogonal|orthonormal|parametr|penal|priorit|quant|random|real|recogn|regular|serial|special|stabil|standard"
    r"|summar|symmetr|synchron|token|util|vector|visual)is(?:e|ed|er|es|ing|ation)(?![a-z])"
    r"|(?:cancel|label|level|model|signal|total|travel)l(?:ed|ing)(?![a-z])"
    r"|(?:after|back|down|for|to|up)wards(?![a-z])"
    r"|artefacts?|catalogue|centre|fibre|litre|metre|theatre|licence|defence|offence"
    r"|(?<![a-z])grey(?![a-z])|judgement|plough|practise|programme(?![a-z])|amongst|whilst|learnt|spelt"
    r")"
)
WORD = re.compile(r"[A-Za-z_]+")
# Upstream's name for a file, and the text that the embedded model was trained on.
ALLOWED = {
    "patchkit/export/publish.py": {"LICENCE"},
    "examples/make_factworld.py": {"favourite", "practise", "ploughs", "harbour"},
}
REGISTRY = re.compile(r"(?i)\b(?:pypi|pythonhosted|npmjs|anaconda|conda-forge)\.[a-z]{2,}")


def written() -> list[str]:
    """Every file of the repository that people read or that prints something."""
    kinds = ["*.py", "*.md", "*.toml", "*.yaml", "*.yml", "*.svg", "Makefile", "constraints.txt", ".ci/run"]
    listed = subprocess.run(["git", "ls-files", "--", *kinds], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


FILES = [name for name in written() if name != "tests/test_words.py"]


@pytest.mark.parametrize(
    ("verb", "one"), [("hold", "holds"), ("do", "does"), ("are", "is"), ("have", "has"), ("get", "gets")]
)
def test_verbs_go_with_their_number(verb: str, one: str) -> None:
    assert [agreeing(count, verb) for count in (0, 1, 2)] == [verb, one, verb]


def test_what_is_named_stands_on_one_line() -> None:
    assert listed(["a\nb", "c"], 1) == "a b and 1 more"
    assert in_short("the\nid", "Ada", "is " * 20) == f"the id (Ada -> {'is ' * 8}...)"


def test_spelling_is_american() -> None:
    found = []
    for name in FILES:
        words = set(WORD.findall((ROOT / name).read_text(encoding="utf-8"))) - ALLOWED.get(name, set())
        found += [f"{name}: {word}" for word in sorted(words) if BRITISH.search(word)]
    assert found == []


@pytest.mark.parametrize("word", ["neighbours", "optimiser", "_normalised_rows", "artefact", "labelled", "afterwards"])
def test_a_british_word_would_be_found(word: str) -> None:
    assert BRITISH.search(word)


@pytest.mark.parametrize("word", ["neighbors", "hour", "premise", "realistic", "rephrase", "tokens", "afterward"])
def test_an_american_word_is_left_alone(word: str) -> None:
    assert not BRITISH.search(word)


def test_nothing_names_the_host_of_a_package_index() -> None:
    assert [name for name in FILES if REGISTRY.search((ROOT / name).read_text(encoding="utf-8"))] == []
    assert REGISTRY.search("see pypi." + "example")
