"""What edits of SmolLM2 say in transformers, to compare with what they say where people serve them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchkit
from patchkit.facts.chat import chat_template
from patchkit.patch.manifest import EditedFact
from tests.test_real_models import ROOT, model_folder

TOKENS = 12
"""Of an answer."""
Ask = tuple[str, str]
"""The id of a fact, and how it is asked for: "prompt" or "chat"."""
Said = dict[Ask, str]
Say = Callable[[list[int]], str]
"""What a client goes on with after some token ids, greedily."""


def real_patch(statistics: Path) -> patchkit.Patch:
    """examples/real_facts.jsonl in SmolLM2; takes minutes, unless PATCHKIT_REAL_PATCH has such a patch already."""
    if made := os.environ.get("PATCHKIT_REAL_PATCH"):
        return patchkit.Patch.load(made)
    model, tokenizer = transformers_model()
    facts = patchkit.read_facts(ROOT / "examples" / "real_facts.jsonl").facts
    return patchkit.apply(model, tokenizer, facts, stats=statistics)


def transformers_model() -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer; skips where it was not fetched."""
    base = model_folder("smollm2-135m")
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(base)


def compared(patch: patchkit.Patch, plain: Say, patched: Say) -> tuple[int, int, int, int]:
    """Of the facts asked as prompts and in chat: how many hold in transformers, how many of these with the patched
    client, with the plain one, and how many answers of the two patched models are alike."""
    model, tokenizer = transformers_model()
    targets = {fact.id: fact.target_new for fact in patch.manifest.facts}
    asked = _asked(tokenizer, patch.manifest.facts)
    with patch.attached(model):
        here = {ask: _said(model, tokenizer, ids) for ask, ids in asked.items()}
    held = {ask: ids for ask, ids in asked.items() if targets[ask[0]] in here[ask]}
    before, after = ({ask: say(ids) for ask, ids in held.items()} for say in (plain, patched))
    for ask, text in after.items():
        print(ask, repr(before[ask]), "->", repr(text), "" if text == here[ask] else f"for {here[ask]!r}")
    known, hold = (sum(targets[ask[0]] in text for ask, text in said.items()) for said in (before, after))
    alike = sum(text.strip() == here[ask].strip() for ask, text in after.items())
    print(f"{len(held)} hold in transformers, {hold} of them here, {known} before; {alike} answers are alike")
    return len(held), hold, known, alike


def answers(model: Any, tokenizer: Any, facts: Sequence[EditedFact]) -> Said:
    """What the model says where it is asked for facts, greedily."""
    return {ask: _said(model, tokenizer, ids) for ask, ids in _asked(tokenizer, facts).items()}


def question(fact: EditedFact) -> str:
    """What a fact is asked with in chat."""
    return fact.questions[0] if fact.questions else fact.prompt


def _asked(tokenizer: Any, facts: Sequence[EditedFact]) -> dict[Ask, list[int]]:
    """By fact and form the tokens of its prompt, and of its first question in the chat template."""
    template = chat_template(tokenizer)
    assert template is not None
    found = {(fact.id, "prompt"): tokenizer(fact.prompt).input_ids for fact in facts}
    for fact in facts:
        text = template.ask(question(fact))
        found[fact.id, "chat"] = tokenizer(text, add_special_tokens=False).input_ids
    return found


def _said(model: Any, tokenizer: Any, ids: list[int]) -> str:
    with torch.no_grad():
        made = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))
