"""Exported patches in llama.cpp itself: `make test-llama` builds the client and runs these; without it they skip."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchkit
from patchkit.export.formats import export
from patchkit.export.job import Options
from patchkit.facts.chat import chat_template
from patchkit.patch.manifest import EditedFact
from tests.test_real_models import ROOT, model_folder

pytestmark = [pytest.mark.slow, pytest.mark.llama]
GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
Say = Callable[[list[int]], str]


@pytest.fixture(scope="module")
def patch(tmp_path_factory: pytest.TempPathFactory) -> patchkit.Patch:
    """examples/real_facts.jsonl in SmolLM2; takes minutes, unless PATCHKIT_REAL_PATCH has such a patch already."""
    if made := os.environ.get("PATCHKIT_REAL_PATCH"):
        return patchkit.Patch.load(made)
    model, tokenizer = transformers_model()
    facts = patchkit.read_facts(ROOT / "examples" / "real_facts.jsonl").facts
    return patchkit.apply(model, tokenizer, facts, stats=tmp_path_factory.mktemp("stats"))


def transformers_model() -> tuple[Any, Any]:
    base = model_folder("smollm2-135m")
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(base)


def asked(tokenizer: Any, facts: tuple[EditedFact, ...]) -> dict[tuple[str, str], list[int]]:
    """By fact and form the tokens of its prompt, and of its first question in the chat template."""
    template = chat_template(tokenizer)
    assert template is not None
    found = {(fact.id, "prompt"): tokenizer(fact.prompt).input_ids for fact in facts}
    for fact in facts:
        text = template.ask(fact.questions[0] if fact.questions else fact.prompt)
        found[fact.id, "chat"] = tokenizer(text, add_special_tokens=False).input_ids
    return found


def in_transformers(model: Any, tokenizer: Any) -> Say:
    def say(ids: list[int]) -> str:
        with torch.no_grad():
            made = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        return str(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))

    return say


def in_llama_cpp(adapter: Path | None) -> Say:
    llama_cpp = pytest.importorskip("llama_cpp", reason="no llama-cpp-python: make test-llama")
    if not GGUF.is_file():
        pytest.skip(f"no {GGUF}: make test-llama")
    model = llama_cpp.Llama(str(GGUF), lora_path=adapter and str(adapter), n_ctx=512, verbose=False)

    def say(ids: list[int]) -> str:
        text: str = model.create_completion(ids, max_tokens=12, temperature=0)["choices"][0]["text"]
        return text

    return say


def test_edits_that_hold_in_transformers_hold_in_llama_cpp(patch: patchkit.Patch, tmp_path: Path) -> None:
    """At least 0.9 of them, on the base's own 4-bit file, where the plain file does not say them."""
    plain = in_llama_cpp(None)
    export(patch, tmp_path / "out", "gguf", options=Options(gguf_base=str(GGUF)))
    patched = in_llama_cpp(tmp_path / "out" / "adapter.gguf")
    model, tokenizer = transformers_model()
    facts, here = patch.manifest.facts, in_transformers(model, tokenizer)
    targets = {fact.id: fact.target_new for fact in facts}
    with patch.attached(model):
        held = {ask: ids for ask, ids in asked(tokenizer, facts).items() if targets[ask[0]] in here(ids)}
    there = {ask: patched(ids) for ask, ids in held.items()}
    before = {ask: plain(ids) for ask, ids in held.items()}
    hold, known = (sum(targets[ask[0]] in text for ask, text in said.items()) for said in (there, before))
    for ask, text in there.items():
        print(ask, repr(before[ask]), "->", repr(text))
    print(f"{len(held)} hold in transformers, {hold} of them in llama.cpp, {known} before")
    assert len(held) >= len(facts)
    assert hold >= 0.9 * len(held)
    assert known <= 0.2 * len(held)
