"""The whole life of a patch through the command line, on the embedded model, as a user would live it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import patchkit
from patchkit.cli import cli
from patchkit.model.loading import embedded_model
from tests.hub_server import Hub, reachable

Record = dict[str, Any]
EXAMPLES = [json.loads(line) for line in (embedded_model().parent / "facts.jsonl").read_text("utf-8").splitlines()]
FIRST, MORE = [EXAMPLES[0], *EXAMPLES[2:4]], EXAMPLES[4:6]
BORN, TRADE, TONGUE = FIRST
MOVED = {**BORN, "id": "moved", "target_new": "Pelwick"}
"""The first fact again, with another target: born in Pelwick now, not in Liscombe."""
REPO, WHOLE = "ada/story", "ada/story-merged"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with reachable(monkeypatch, tmp_path / "hub-cache") as server:
        yield server


def run(*args: object) -> str:
    """Standard output of `patchkit ARGS...`, which has to succeed."""
    ended = CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def write(name: str, *facts: Record) -> Path:
    Path(name).write_text("".join(json.dumps(fact) + "\n" for fact in facts), encoding="utf-8")
    return Path(name)


def says(patch: object, *facts: Record) -> list[str]:
    """What the patched model says after each fact's prompt, as many words as the target has, by `generate`."""
    answers = json.loads(run("generate", "--json", "--patch", patch, *(fact["prompt"] for fact in facts)))["answers"]
    return [first_words(answer["patched"], fact) for answer, fact in zip(answers, facts, strict=True)]


def first_words(text: str, fact: Record) -> str:
    return " ".join(text.replace(".", " ").split()[: len(fact["target_new"].split())])


@torch.no_grad()
def completes(model: PreTrainedModel, fact: Record) -> str:
    """What plain transformers says after the fact's prompt."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    ids = tokenizer(fact["prompt"], return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=8, do_sample=False)
    return first_words(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), fact)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(3, 40)[None]).logits


def load(name: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()


def test_the_life_of_a_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.chdir(tmp_path)
    base = {file.name: file.read_bytes() for file in embedded_model().iterdir()}

    made = run("apply", write("first.jsonl", *FIRST), "--out", "story")
    assert made.count("✓") == 3
    assert "perplexity of plain text" in made
    compared = run("generate", "--compare", "--patch", "story", BORN["prompt"])
    assert "Marburgh" in compared
    assert "Liscombe" in compared

    more = write("more.jsonl", TRADE, MOVED, *MORE)
    continued = json.loads(run("apply", more, "--onto", "story", "--json"))
    assert continued["skipped"] == [TRADE["id"]]
    assert continued["superseded"] == {BORN["id"]: "moved"}
    assert continued["added"] == ["moved", *(fact["id"] for fact in MORE)]
    assert says("story", MOVED, TRADE, TONGUE, *MORE) == [fact["target_new"] for fact in (MOVED, TRADE, TONGUE, *MORE)]

    assert f"- {TONGUE['id']}" in run("revert", "story", "--fact", TONGUE["id"])
    assert says("story", TONGUE, MOVED) == [TONGUE["target_true"], "Pelwick"]
    verified = json.loads(run("verify", "story", "--min-efficacy", 1, "--max-perplexity-ratio", "1.05", "--json"))
    assert verified["facts"] == 4

    assert "facts: 4 of 4 hold" in run("merge", "story", "--out", "whole")
    whole = load(tmp_path / "whole")
    assert [completes(whole, fact) for fact in (MOVED, TRADE, *MORE)] == [
        fact["target_new"] for fact in (MOVED, TRADE, *MORE)
    ]
    assert completes(whole, TONGUE) == TONGUE["target_true"]

    assert "PeftModel.from_pretrained" in run("export", "story", "--format", "peft", "--out", "adapter")
    model = load(embedded_model())
    with patchkit.Patch.load("story").attached(model):
        wanted = logits(model)
    assert (logits(model) - wanted).abs().max() > 0.01
    adapted = PeftModel.from_pretrained(load(embedded_model()), "adapter")
    assert torch.allclose(logits(adapted), wanted, atol=1e-4)

    assert f"pushed: {hub.url}/{REPO}/commit/" in run("push", "story", REPO, "--tag", "v1")
    assert f"pushed: {hub.url}/{WHOLE}/commit/" in run("push", "whole", WHOLE)
    here = run("log", "story")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other-cache"))
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "other-statistics"))
    assert run("log", REPO) == here
    for line in ("run 1: apply 3 facts", "run 2: apply 3 facts", "run 3: revert 1 fact", f"- {TONGUE['id']}  "):
        assert line in here
    assert f"~ moved  {BORN['prompt']} -> Pelwick, superseding {BORN['id']} -> Liscombe" in here
    assert says(f"{REPO}@v1", MOVED, TONGUE) == ["Pelwick", TONGUE["target_true"]]
    assert load(WHOLE).state_dict().keys() == whole.state_dict().keys()
    assert all(found.equal(whole.state_dict()[name]) for name, found in load(WHOLE).state_dict().items())

    theirs = json.loads(run("apply", write("theirs.jsonl", TONGUE), "--onto", REPO, "--json"))
    assert theirs["patch"] == "story"
    assert says("story", TONGUE, MOVED, *MORE) == [fact["target_new"] for fact in (TONGUE, MOVED, *MORE)]
    assert run("log", "story").startswith("run 4: apply 1 fact")
    assert load_file("story/patch.safetensors").keys() == load_file(tmp_path / "story/patch.safetensors").keys()
    assert {file.name: file.read_bytes() for file in embedded_model().iterdir()} == base
