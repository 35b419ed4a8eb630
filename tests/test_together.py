"""Patches that were made apart: they act together, or are refused before anything is said or written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import patchkit
from patchkit.errors import InputError
from patchkit.evaluate.answers import Ask
from patchkit.export.merge import merge
from patchkit.model.loading import LoadedModel, load_model
from patchkit.patch.patch import Patch
from patchkit.patch.together import refuse_shared_neurons
from patchkit.serve.talker import Length, Talker
from tests.helpers import Command, write_facts

EXAMPLES = Path(__file__).parent.parent / "examples"
SHARED = r"cannot act together: both have rewritten neuron \d+ of layer 2 .* anew with --beside the other"


@pytest.fixture(scope="module")
def world() -> LoadedModel:
    return load_model(str(EXAMPLES / "factworld"), "cpu", "float32")


@pytest.fixture(scope="module")
def facts() -> list[patchkit.Fact]:
    return list(patchkit.read_facts(EXAMPLES / "facts.jsonl").facts[:3:2])


@pytest.fixture(scope="module")
def apart(world: LoadedModel, facts: list[patchkit.Fact]) -> list[Patch]:
    """Two patches of the same layer; the second one's fact in another layer; and beside the first."""

    def made(fact: patchkit.Fact, layers: str, *beside: Patch) -> Patch:
        return patchkit.apply(world.model, world.tokenizer, [fact], overrides=(layers,), beside=beside)

    first = made(facts[0], "layers=2")
    return [first, made(facts[1], "layers=2"), made(facts[1], "layers=1"), made(facts[1], "layers=2", first)]


def said(world: LoadedModel, fact: patchkit.Fact) -> str:
    ids = world.tokenizer(fact.prompt, return_tensors="pt").input_ids
    made = world.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return str(world.tokenizer.decode(made[0, ids.shape[1] :])).strip()


@pytest.mark.parametrize("second", [2, 3], ids=["in another layer", "beside the first"])
def test_both_say_their_facts(world: LoadedModel, facts: list[patchkit.Fact], apart: list[Patch], second: int) -> None:
    with apart[0].attached(world.model), apart[second].attached(world.model):
        for fact in facts:
            assert said(world, fact).startswith(fact.target_new)


def test_two_that_have_rewritten_the_same_neuron_never_act_together(world: LoadedModel, apart: list[Patch]) -> None:
    """Both would be silent: a gate that is the sum of two fires at neither subject."""
    stack = patchkit.load(world.model, apart[0], "one")
    try:
        with torch.no_grad():
            before = world.model(torch.arange(3, 15)[None]).logits
        with pytest.raises(InputError, match=f"patches one and two {SHARED}"):
            stack.load(apart[1], "two")
        assert (stack.active, list(stack.manifests)) == (("one",), ["one"])
        with torch.no_grad():
            assert torch.equal(world.model(torch.arange(3, 15)[None]).logits, before)
        stack.set_active(())
        stack.load(apart[1], "two")  # to be switched between they may both be there
        with pytest.raises(InputError, match=SHARED):
            stack.set_active(("one", "two"))
        assert stack.active == ("two",)
    finally:
        stack.unload()


def test_a_superseded_fact_keeps_its_neuron(apart: list[Patch]) -> None:
    """Its rows are in the weights still, and whoever takes the same neuron would be silent."""
    one, two = (patch.manifest for patch in apart[:2])
    waiting = one.model_copy(update={"superseded": one.facts, "facts": ()})
    with pytest.raises(InputError, match=SHARED):
        refuse_shared_neurons({"one": waiting, "two": two})


def test_nor_are_they_merged_or_served(
    world: LoadedModel, apart: list[Patch], run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=f"patches 1 and 2 {SHARED}"):
        merge(apart[:2], EXAMPLES / "factworld", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    for name, patch in zip(("one", "two"), apart, strict=False):
        patch.save(tmp_path / name)
    write_facts(
        "facts.jsonl",
        {"prompt": "Pine Kelmel was born in the city of", "subject": "Pine Kelmel", "target_new": "Pelwick"},
    )
    quick = ("--layers", "2", "--quick", "--no-guard", "--set", "value.steps=2", "--allow-close-keys")
    done = run("apply", "facts.jsonl", "--beside", "two", *quick, "--out", "three")
    assert done.status == 0, done.err
    both = {fact.neuron for name in ("two", "three") for fact in Patch.load(name).manifest.facts}
    assert len(both) == 2
    done = run("generate", "Who?", "--model", EXAMPLES / "factworld", "--patch", "one", "--patch", "two")
    assert done.status == 2
    assert "patches 1 and 2 cannot act together" in done.err
    talker = Talker(world.model, world.tokenizer)
    try:
        for name, patch in zip(("one", "two"), apart, strict=False):
            talker.load(name, patch)
        ask = Ask("Who?", message=False)
        assert talker.reply(ask, ["one"], Length(2, 0.0))
        with pytest.raises(InputError, match=SHARED):
            talker.reply(ask, ["one", "two"], Length(2, 0.0))
    finally:
        world.model.patchkit.unload()
