"""Save a patch, load it again, and measure it on the untouched base. Runs on the embedded model."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import patchkit

here = Path(__file__).parent
folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "my-patch"
model = AutoModelForCausalLM.from_pretrained(here / "factworld", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(here / "factworld")
facts = patchkit.read_facts(here / "facts.jsonl", limit=3).facts

patchkit.apply(model, tokenizer, facts, method="memit").save(folder)

patch = patchkit.Patch.load(folder)
report = patchkit.measure(model, tokenizer, patch, facts)
print(f"{folder}: {[file.name for file in sorted(folder.iterdir())]}")
print(f"{report.facts} facts, exact {report.efficacy.exact:.0%}, neighbors unchanged {report.locality.unchanged:.0%}")
