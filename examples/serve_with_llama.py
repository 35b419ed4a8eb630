"""Facts into a model, exported for llama.cpp and Ollama. Runs on the embedded model.

python examples/serve_with_llama.py [FOLDER]    # then the commands that it prints
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import patchkit
from patchkit.export.formats import export, get

here = Path(__file__).parent
base = here / "factworld"
out = Path(sys.argv[1] if len(sys.argv) > 1 else "out/factworld-gguf")

model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
facts = patchkit.read_facts(here / "facts.jsonl", limit=2).facts
patch = patchkit.apply(model, AutoTokenizer.from_pretrained(base), facts)

exported = export(patch, out, "gguf", str(base))
print(f"{out}: rank {exported.rank}, off by at most {max(each.error for each in exported.weights):.0e} of a change")
for command in get("gguf").commands(exported):
    print(command.format(title=out, base=base.name))
print((out / "Modelfile").read_text(encoding="utf-8"), end="")
