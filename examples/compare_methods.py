"""Compare methods on the same facts: what each learns, what it leaves alone, and how large its patch is.

python examples/compare_methods.py [METHOD ...]    # on the embedded model; `patchkit methods` lists them

`patchkit bench` does the same over long sequences of edits, with results that can be gone on with.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import patchkit

here = Path(__file__).parent
methods = sys.argv[1:] or ["alphaedit", "memit", "rome", "mose-right"]
model = AutoModelForCausalLM.from_pretrained(here / "factworld", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(here / "factworld")
facts = patchkit.read_facts(here / "facts.jsonl", limit=4).facts


def share(value: float | None) -> str:
    """A rate, or a dash where there was nothing to measure it on."""
    return "-" if value is None else f"{value:.0%}"


values: dict = {}  # targets found on the untouched model are shared where two methods ask for the same
print(f"{'method':<12}{'efficacy':>10}{'generalization':>16}{'locality':>10}{'perplexity':>12}{'numbers':>10}{'s':>6}")
for method in methods:
    began = time.perf_counter()
    patch = patchkit.apply(model, tokenizer, facts, method, values=values)
    seconds = time.perf_counter() - began
    found = patchkit.measure(model, tokenizer, patch, quick=True)
    perplexity = "-" if found.perplexity is None else f"x{found.perplexity.ratio:.4f}"
    numbers = sum(update.numbers for update in patch.manifest.updates)
    learned, worded = share(found.efficacy.exact), share(found.generalization.exact)
    rates = f"{learned:>10}{worded:>16}{share(found.locality.unchanged):>10}{perplexity:>12}"
    print(f"{method:<12}{rates}{numbers:>10,}{seconds:>6.1f}")
