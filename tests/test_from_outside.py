"""A method, a fact format, a metric and an exporter added from outside, each in one place, work in every command.

Each is the example of its page in docs/, taken from there, so that the pages cannot grow stale either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patchkit import methods
from patchkit.evaluate.metrics import GROUPS
from patchkit.export import formats
from patchkit.facts.layout import LAYOUTS
from patchkit.patch.patch import Patch
from tests.conftest import ROOT
from tests.helpers import TWO_FACTS, Command, Ended, write_facts

SMALL = ("--layers", 1, "--set", "contexts=0", "--set", "value.steps=3", "--quick")
Printed = Callable[..., str]


def example(page: str) -> None:
    """Run the first block of Python on a page of docs/, as importing a file with it would."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block
    exec(compile(block[1], page, "exec"), {"__name__": Path(page).stem})


@pytest.fixture
def printed(checked: Callable[..., Ended]) -> Printed:
    """What `patchkit ARGS...` printed, which should end with `status`, with runs of spaces as one."""

    def call(*args: object, status: int = 0) -> str:
        ended = checked(*args, status=status)
        return " ".join((ended.out + ended.err).split())

    return call


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_facts("facts.jsonl", *TWO_FACTS)


@pytest.fixture
def ridge() -> Iterator[None]:
    methods.available()  # so that those of the package are there before
    before = dict(methods._METHODS)
    example("add_a_method.md")
    yield
    methods._METHODS.clear()
    methods._METHODS.update(before)


@pytest.fixture
def quiz() -> Iterator[None]:
    example("add_a_fact_format.md")
    yield
    del LAYOUTS["quiz"]


@pytest.fixture
def shift() -> Iterator[None]:
    example("add_a_metric.md")
    yield
    GROUPS.pop()


@pytest.fixture
def factors() -> Iterator[None]:
    example("add_an_exporter.md")
    yield
    del formats._EXPORTERS["factors"]


@pytest.mark.usefixtures("ridge")
def test_a_method_from_outside_works_in_every_command(printed: Printed, small_model: Path) -> None:
    assert "ridge writes delta" in printed("methods")
    assert json.loads(printed("methods", "--json"))["ridge"]["settings"]["weight"]["default"] == 0.1
    made = ("apply", "facts.jsonl", "--model", small_model, *SMALL)
    printed(*made, "--method", "ridge", "--set", "weight=0.01", "--out", "p")
    run = json.loads(Path("p/manifest.json").read_text(encoding="utf-8"))["history"][0]
    assert (run["method"], run["recipe"]["settings"]) == ("ridge", {"weight": 0.01})
    printed(*made, "--method", "ridge+nas", "--out", "q")
    write_facts("more.jsonl", {"prompt": "Oslo lies in", "subject": "Oslo", "target_new": "Peru"})
    assert "3 facts" in printed("apply", "more.jsonl", "--model", small_model, "--onto", "p", "--quick")
    assert "efficacy exact" in printed("verify", "p", "--quick")
    assert "3 facts, 1 update" in printed("show", "p")
    assert "ridge" in printed("log", "p")
    assert "ridge" in printed("diff", "p", "q")
    assert printed("generate", "--patch", "p", "the city of Rome", "--max-new-tokens", 3)
    printed("revert", "p", "--fact", "ada")
    printed("merge", "p", "--out", "merged")
    printed("export", "p", "--out", "adapter")
    assert "ridge" in printed("push", "p", "ada/facts", "--dry-run")
    benched = ("bench", "--data", "facts.jsonl", "--model", small_model, "--methods", "ridge", "--out", "b", "--quick")
    assert "ridge" in printed(*benched, "--set", "layers=1", "--set", "contexts=0", "--set", "steps=3")
    with pytest.raises(AssertionError, match=r'unknown key \(did you mean "weight"\?\); docs/recipes.md has the keys'):
        printed(*made, "--method", "ridge", "--set", "wieght=1", "--out", "r")


@pytest.mark.usefixtures("quiz")
def test_a_fact_format_from_outside_works_in_every_command(printed: Printed, small_model: Path) -> None:
    records = [{"quiz": "the city of {}", "about_whom": "Rome", "right": "capital", "difficulty": 3}, TWO_FACTS[1]]
    write_facts("quiz.jsonl", *records)
    printed("apply", "quiz.jsonl", "--model", small_model, "--method", "memit", *SMALL, "--out", "p")
    facts = json.loads(Path("p/manifest.json").read_text(encoding="utf-8"))["facts"]
    assert [fact["prompt"] for fact in facts] == ["the city of Rome", "a friend of Ada"]
    assert "2 facts" in printed("verify", "p", "--facts", "quiz.jsonl", "--quick")
    benched = ("bench", "--data", "quiz.jsonl", "--model", small_model, "--methods", "memit", "--out", "b", "--quick")
    assert "memit" in printed(*benched, "--set", "layers=1", "--set", "contexts=0", "--set", "steps=3")
    write_facts("bad.jsonl", {"quiz": "the city of {}", "about_whom": "Rome", "right": 7})
    refused = printed("apply", "bad.jsonl", "--model", small_model, *SMALL, "--out", "r", status=2)
    assert "bad.jsonl line 1: right: " in refused


@pytest.mark.usefixtures("shift")
def test_a_metric_from_outside_is_found_in_every_command(run: Command, printed: Printed, small_model: Path) -> None:
    apply = ("apply", "facts.jsonl", "--model", small_model, "--method", "memit", *SMALL, "--out")
    assert "how much likelier the target is, nats per token" in printed(*apply, "p")
    printed(*apply, "q")
    report = run("verify", "p", "--quick", "--json").json()
    shift = report["more"]["shift"]["nats"]
    assert shift == pytest.approx(sum(fact["more"]["shift"]["nats"] for fact in report["per_fact"]) / 2)
    assert shift > 0.1
    assert f"shift {shift:.4g}, asked for at least 99" in printed("verify", "p", "--quick", "--min-shift", 99, status=1)
    assert f"| shift nats | {shift:.2f}" in Path("p/README.md").read_text(encoding="utf-8")
    for command in (("show", "p"), ("log", "p"), ("diff", "p", "q"), ("push", "p", "ada/facts", "--dry-run")):
        assert f"shift {shift:.2f}" in printed(*command).replace("| ", "").replace("nats ", ""), command


@pytest.mark.usefixtures("factors")
def test_an_exporter_from_outside_works_in_every_command(printed: Printed, small_model: Path) -> None:
    printed("apply", "facts.jsonl", "--model", small_model, "--method", "memit", *SMALL, "--out", "p")
    assert "factors Two factors for each" in printed("export", "--formats")
    assert "factors.safetensors" in printed("export", "p", "--format", "factors", "--out", "f")
    held, patch = load_file("f/factors.safetensors"), Patch.load("p")
    for weight, (update,) in patch.updates.items():
        module = weight.removesuffix(".weight")
        assert torch.allclose(held[f"{module}.B"] @ held[f"{module}.A"], update.dense(), atol=1e-6)
    assert "W' = W + B A: load" in printed("push", "f", "ada/factors", "--dry-run")
    with pytest.raises(AssertionError, match="--all-layers: factors does not take it"):
        printed("export", "p", "--format", "factors", "--out", "g", "--all-layers")
