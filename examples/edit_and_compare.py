"""Patch two facts into a model and compare what it says with and without them. Runs on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import patchkit

here = Path(__file__).parent
model = AutoModelForCausalLM.from_pretrained(here / "factworld", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(here / "factworld")
facts = [json.loads(line) for line in (here / "facts.jsonl").read_text(encoding="utf-8").splitlines()[:2]]

patch = patchkit.apply(model, tokenizer, facts, method="alphaedit")  # the model is bit for bit what it was


def say(prompt: str) -> str:
    """The model's greedy continuation of `prompt`."""
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :]))


for fact in facts:
    base = say(fact["prompt"])
    with patch.attached(model):
        print(f"{fact['prompt']} ...\n  base:   {base}\n  patched:{say(fact['prompt'])}")
