"""Publish a patch on the Hub, with the adapter that PEFT and vLLM load from the same repository. On the embedded model.

python examples/publish.py [USER/NAME]    # without a name it prints what would be published and touches no network
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import patchkit
from patchkit.export.publish import pack, push

here = Path(__file__).parent
repo = sys.argv[1] if len(sys.argv) > 1 else None
model = AutoModelForCausalLM.from_pretrained(here / "factworld", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(here / "factworld")

patch = patchkit.apply(model, tokenizer, patchkit.read_facts(here / "facts.jsonl", limit=2).facts)
report = patchkit.measure(model, tokenizer, patch, quick=True)

with tempfile.TemporaryDirectory() as folder:
    # What was measured goes into the manifest, and from there into the card that people read.
    patch.with_metrics(report.summary(), report.outcomes()).save(Path(folder) / "patch")
    package = pack(Path(folder) / "patch", repo or "user/name", adapter=True)
    for name, size in package.sizes().items():
        print(f"{size:>10,}  {name}")
    print(package.card.partition("\n## Use")[0])
    if repo:
        print(f"published: {push(package, repo, say=print).url}")
