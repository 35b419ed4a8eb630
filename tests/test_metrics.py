"""The table of metrics: one added from outside is measured and shown by every command, and no number stands alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from patchkit.evaluate.metric import Gate, Metric
from patchkit.evaluate.metrics import GROUPS, Group, register
from patchkit.evaluate.trial import Found, Trial
from patchkit.patch.card import model_card
from patchkit.patch.patch import read_manifest
from patchkit.words import in_markdown
from tests.helpers import TWO_FACTS, Ended, edit_manifest, write_facts

QUICK = "--quick"  # what is told apart here are the metrics, not the texts a random model writes
LOUD = (
    *("--set", "value.clamp=20", "--set", "value.steps=60", "--set", "null_energy=0.9", "--set", "kl_weight=0"),
    "--no-guard",  # it moves all that a random model says
)
Printed = Callable[..., str]


@pytest.fixture
def printed(checked: Callable[..., Ended]) -> Printed:
    """What `patchkit ARGS...` printed, which should end with `status`: on stdout, or why it failed."""

    def call(*args: object, status: int = 0) -> str:
        ended = checked(*args, status=status)
        return ended.err if status else ended.out

    return call


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_facts("facts.jsonl", *TWO_FACTS)


class Wordiness:
    """Counts facts, as no model knows better."""

    def base(self, trial: Trial) -> int:
        return len(trial.facts)

    def patched(self, trial: Trial, base: int) -> Found:
        assert base >= len(trial.facts)
        per_fact = {fact.id: {"words": len(fact.prompt.split())} for fact in trial.facts}
        return Found({"short": 0.25, "long": None}, {"short": 4 * len(trial.facts), "long": 0}, per_fact)


@pytest.fixture
def wordiness() -> Iterator[None]:
    """A metric from outside, with a gate that publishing asks for."""
    short = Metric(
        "wordiness",
        "short",
        "prompts that are short",
        "Share of prompts that are short.",
        "prompt",
        headline="brevity",
        column="brief",
        gate=Gate("brevity", "Least share of short prompts.", published=0.5),
    )
    group = Group("wordiness", (short, Metric("wordiness", "long", "the others", "The others.", "prompt")), Wordiness)
    register(group)
    yield
    GROUPS.remove(group)


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.usefixtures("wordiness")
def test_a_metric_from_outside_is_in_every_command(printed: Printed, small_model: Path) -> None:
    made = ("apply", "facts.jsonl", "--model", small_model, "--layers", "1", *LOUD)
    talk = ("--min-asked", 0, "--max-overfit", 1, "--min-unrelated", 0)
    assert "wordiness short 25.0% 8 prompts prompts that are short" in words(printed(*made, QUICK, "--out", "p"))
    report = json.loads(printed("verify", "p", QUICK, "--json"))
    assert report["more"]["wordiness"] == {"short": 0.25, "long": None}
    assert report["counts"]["wordiness"]["short"] == 8
    assert [fact["more"]["wordiness"]["words"] for fact in report["per_fact"]] == [4, 4]
    assert "brevity 0.25, asked for at least 0.3" in printed("verify", "p", QUICK, "--min-brevity", 0.3, status=1)
    assert "--min-brevity" in printed("verify", "--help")
    loose = ("--min-efficacy", 0, "--max-perplexity-ratio", 1000)
    assert "brevity 0.25, asked for at least 0.5" in printed(
        *made, *talk, *loose, "--out", "q", "--merge", "m", status=1
    )
    assert "wordiness short 25.0% 8 prompts prompts that are short" in words(printed("show", "p"))
    logged = words(printed("log", "p"))
    assert "brevity 25.0% on 8 prompts" in logged
    assert logged.endswith("brevity: prompts that are short")
    differ = words(printed("diff", "p", "q"))
    assert "metric a b what it counts" in differ
    assert "wordiness short 25.0% on 8 prompts 25.0% on 8 prompts prompts that are short" in differ
    card = Path("p/README.md").read_text(encoding="utf-8")
    assert "| wordiness short | 25.0% | 8 prompts | prompts that are short |" in card
    assert "wordiness_short" in card
    assert "wordiness short | 25.0%" in printed("push", "p", "ada/facts", "--dry-run")
    assert "wordiness short 25.0% 4 prompts" in words(printed("revert", "p", "--fact", "ada", "--measure"))
    methods = ("--methods", "memit", "--batch-size", 2, "--set", "contexts=0", "--set", "steps=2")
    benched = printed(
        "bench", QUICK, "--data", "facts.jsonl", "--model", small_model, *methods, "--out", "b", "--set", "layers=1"
    )
    assert "brief" in benched
    rows = list(csv.DictReader(io.StringIO(Path("b/table.csv").read_text(encoding="utf-8"))))
    assert [row["wordiness_short"] for row in rows] == ["0.25", "0.25"]
    assert "brief" in Path("b/table.md").read_text(encoding="utf-8")


def test_a_group_is_registered_once() -> None:
    with pytest.raises(ValueError, match="efficacy already"):
        register(Group("efficacy", ()))
    with pytest.raises(ValueError, match="name it as its group"):
        register(Group("new", GROUPS[0].metrics))


def test_facts_that_do_not_hold_are_named_with_what_is_said_instead(printed: Printed, small_model: Path) -> None:
    """Two steps of optimization write no fact."""
    weak = ("--set", "contexts=0", "--set", "steps=2", "--layers", "1")
    table = printed("apply", "facts.jsonl", "--model", small_model, *weak, QUICK, "--out", "p")
    outcomes = read_manifest(Path("p")).outcomes
    report = json.loads(printed("verify", "p", QUICK, "--json"))
    assert {fact["id"]: fact["says_after"] for fact in report["per_fact"]} == {
        name: outcome.says for name, outcome in outcomes.items()
    }
    assert not any(outcome.holds for outcome in outcomes.values())
    assert table.count("✗  ") == 2  # and once more each where it says why
    shown, card = words(printed("show", "p")), Path("p/README.md").read_text(encoding="utf-8")
    assert "of 2 facts, 2 do not hold: rome, ada" in shown
    assert "Of 2 facts, 0 hold. These do not: rome, ada." in card
    for name, fact in zip(outcomes, TWO_FACTS, strict=True):
        said = " ".join(outcomes[name].says.split()[:2])
        assert f"{fact['prompt']} {fact['target_new']} {said} ✗" in shown
        assert f"| {fact['prompt']} | {fact['target_new']} | {said} |" in card


def test_a_patch_changed_since_it_was_measured_does_not_say_what_it_says(printed: Printed, small_model: Path) -> None:
    printed("apply", "facts.jsonl", "--model", small_model, "--layers", "1", *LOUD, QUICK, "--out", "p")
    assert "Of 2 facts, 2 hold." in Path("p/README.md").read_text(encoding="utf-8")
    edit_manifest(Path("p"), lambda fields: fields["outcomes"]["ada"].update(holds=False))
    assert "of 2 facts, 1 does not hold: ada" in words(printed("show", "p"))
    assert "Of 2 facts, 1 holds. This one does not: ada." in model_card(read_manifest(Path("p")), "p")
    printed("revert", "p", "--fact", "ada")
    assert read_manifest(Path("p")).outcomes == {}
    assert "the city of Rome capital not measured Paris" in words(printed("show", "p"))
    assert "Which of them hold was not measured." in Path("p/README.md").read_text(encoding="utf-8")


def of_earlier_version(manifest: dict[str, Any]) -> None:
    del manifest["outcomes"]
    for key in ("counts", "more"):
        del manifest["history"][0]["metrics"][key]


def test_manifests_from_before_counts_and_outcomes_load_and_show(printed: Printed, small_model: Path) -> None:
    printed("apply", "facts.jsonl", "--model", small_model, "--layers", "1", *LOUD, QUICK, "--out", "p")
    edit_manifest(Path("p"), of_earlier_version)
    assert "the city of Rome capital not measured Paris" in words(printed("show", "p"))
    assert "efficacy 100.0%, generalization -," in printed("log", "p")
    assert "efficacy exact 100.0% 100.0%" in words(printed("diff", "p", "p"))
    assert "| efficacy exact | 100.0% |  |" in printed("push", "p", "ada/facts", "--dry-run")


def test_nothing_in_a_fact_takes_effect_in_a_card() -> None:
    hostile = "![x](http://a) <img> `b` **c** a|b\nd\x1b[31m &amp; [e](javascript:f)"
    shown = in_markdown(hostile)
    assert shown == (r"\!\[x\](http://a) &lt;img> \`b\` \*\*c\*\* a\|b d\[31m &amp;amp; \[e\](javascript:f)")
