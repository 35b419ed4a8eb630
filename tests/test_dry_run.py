"""What `apply --dry-run` shows of a run, and that it leaves everything alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import zoo
from tests.helpers import Command, tree, write_facts

ROME = {"id": "rome", "prompt": "The city of Rome lies in", "subject": "Rome", "target_new": "Peru"}
ADA = {"id": "ada", "prompt": "Ada Lovelace was a", "subject": "Ada Lovelace", "target_new": "painter"}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_facts("facts.jsonl", ROME, ADA)
    return zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), tmp_path / "model")


def test_a_dry_run_shows_facts_spans_layers_time_and_memory_and_writes_nothing(run: Command, model: Path) -> None:
    there = tree(Path.cwd())
    ended = run("apply", "facts.jsonl", "--model", model, "--layers", "1-2", "--batch-size", 1, "--dry-run", "--json")
    assert ended.status == 0, ended.err
    found = ended.json()
    rome, ada = found["facts"]
    tokens, (first, end) = rome["tokens"], rome["target_tokens"]
    assert tokens[rome["subject_token"]] == "e"  # of R o m e
    assert "".join(tokens[first:end]).lstrip("Ġ") == "Peru"
    assert (rome["line"], ada["line"]) == (1, 2)
    assert [weight["layer"] for weight in found["weights"]] == [1, 2]
    assert found["weights"][0]["weight"] == "model.layers.1.mlp.down_proj.weight"
    assert (found["method"], found["batches"]) == ("alphaedit", [1, 1])
    assert set(found["seconds"]) == {"statistics", "contexts", "values", "measuring"}
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert found["memory"] > weights
    assert tree(Path.cwd()) == there


def test_its_table_marks_the_spans(run: Command, model: Path) -> None:
    shown = " ".join(run("apply", "facts.jsonl", "--model", model, "--layers", "1", "--dry-run").out.split())
    assert "R o m [e]" in shown
    assert "would edit 2 facts in 1 solve with alphaedit, layers 1: model.layers.1.mlp.down_proj.weight" in shown
    assert "nothing was edited and nothing written" in shown


def test_statistics_that_are_stored_take_no_time_and_more_facts_take_more(run: Command, model: Path) -> None:
    few = ("apply", "--fact", "Rome lies in | Rome | Peru", "--model", model, "--layers", "1", "--stats", "stats")
    before = run(*few, "--dry-run", "--json").json()
    assert not before["statistics_stored"]
    assert before["seconds"]["statistics"] > 0
    assert run("stats", "--model", model, "--layers", "1", "--out", "stats").status == 0
    after = run(*few, "--dry-run", "--json").json()
    assert after["statistics_stored"]
    assert after["seconds"]["statistics"] == 0


def test_what_apply_refuses_a_dry_run_refuses(run: Command, model: Path) -> None:
    write_facts("bad.jsonl", {**ROME, "subject": "Oslo"})
    ended = run("apply", "bad.jsonl", "--model", model, "--dry-run")
    assert ended.status == 2
    assert '"Oslo" is not in prompt' in ended.err
    write_facts("patched.jsonl", ROME)
    made = ("--model", model, "--layers", "1", "--set", "steps=2", "--quick", "--out", "p")
    assert run("apply", "patched.jsonl", *made).status == 0
    found = run("apply", "facts.jsonl", "--onto", "p", "--model", model, "--dry-run", "--json").json()
    assert found["skipped"] == ["rome"]
    assert json.dumps(found["facts"]).count('"id"') == 1
