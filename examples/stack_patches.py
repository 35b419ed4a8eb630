"""Attach two patches to a live model, switch them, and take them off again. Runs on the embedded model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchkit

here = Path(__file__).parent
model = AutoModelForCausalLM.from_pretrained(here / "factworld", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(here / "factworld")
facts = patchkit.read_facts(here / "facts.jsonl", limit=3).facts[::2]
originals = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def show(when: str) -> None:
    """Print what the model says to both prompts."""
    print(when)
    for fact in facts:
        asked = tokenizer(fact.prompt, return_tensors="pt")
        out = model.generate(**asked, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        print(f"  {tokenizer.decode(out[0], skip_special_tokens=True)!r} (the patch says {fact.target_new!r})")


first = patchkit.apply(model, tokenizer, facts[:1])
second = patchkit.apply(model, tokenizer, facts[1:], beside=[first])  # it leaves the neurons of the first alone
show("base:")
patches = patchkit.load(model, first, name="first")
patchkit.load(model, second, name="second")
show(f"{patches.active}:")
with patches.disable():
    show("disabled:")
patches.set_active(["second"])
show(f"{patches.active}:")
patches.merge()
show("the same, merged into the weights:")
patches.unload()
same = all(torch.equal(tensor, originals[name]) for name, tensor in model.state_dict().items())
print(f"unloaded; every weight is bit for bit as it was: {same}")
