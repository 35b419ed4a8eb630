"""Go on from somebody's patch: one of their facts superseded, one added and taken out again. On the embedded model."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import patchkit

here = Path(__file__).parent
place = Path(sys.argv[1] if len(sys.argv) > 1 else "out/theirs")
model = AutoModelForCausalLM.from_pretrained(here / "factworld", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(here / "factworld")
born, _, trade = patchkit.read_facts(here / "facts.jsonl", limit=3).facts


def show(name: str, patch: patchkit.Patch) -> None:
    """Print what the patched model says of both facts."""
    with patch.attached(model):
        for fact in (born, trade):
            asked = tokenizer(fact.prompt, return_tensors="pt")
            out = model.generate(**asked, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.eos_token_id)
            print(f"{name}: {tokenizer.decode(out[0], skip_special_tokens=True)!r}")


patchkit.apply(model, tokenizer, [born]).save(place)  # what somebody has published
theirs = patchkit.Patch.load(place)
moved = born.model_copy(update={"id": "moved", "target_new": "Pelwick"})
ours = patchkit.apply(model, tokenizer, [moved, trade], onto=theirs)
less = patchkit.revert(model, tokenizer, ours, [trade.id])

for name, patch in (("theirs", theirs), ("with ours", ours), ("less one", less)):
    show(name, patch)
print("history:", ", ".join(f"{run.action} {len(run.facts)}" for run in less.manifest.history))
