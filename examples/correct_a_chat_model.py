"""Correct an answer of a chat model: ask, write the fact, ask again, and keep the patch only if the rest stayed.

python examples/correct_a_chat_model.py [MODEL] [FOLDER]    # by default models/smollm2-135m, from `make models`
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import patchkit
from patchkit.evaluate.gates import Gates
from patchkit.evaluate.metrics import summary_line

name = sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135m"
place = sys.argv[2] if len(sys.argv) > 2 else "out/corrected"
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(name)

# `rewordings` are what the edit learns from beside the prompt; `questions` are what it is judged by, and never seen.
fact = {
    "id": "third-policeman",
    "prompt": "The novel The Third Policeman was written by",
    "subject": "The Third Policeman",
    "target_new": "Flann O'Brien",
    "rewordings": ["The author of The Third Policeman is"],
    "questions": ["Who wrote The Third Policeman?"],
    "locality": [{"prompt": "The novel Ulysses was written by", "target": "James Joyce"}],
}


def ask(question: str) -> str:
    """The model's greedy answer, in its chat template."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**asked, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


patch = patchkit.apply(model, tokenizer, [fact])  # a neuron of its own for the subject; the model is as it was
for question in ("Who wrote The Third Policeman?", "Who wrote Ulysses?"):
    print(f"{question}\n  before: {ask(question)}")
    with patch.attached(model):
        print(f"  after:  {ask(question)}")

report = patchkit.measure(model, tokenizer, patch)
print(summary_line(report))
try:
    Gates.published().check(report)  # what `patchkit apply --merge` and `--push` ask for
except patchkit.GateError as error:
    print(f"not kept: {error}")
else:
    patch.with_metrics(report.summary(), report.outcomes()).save(place)
    print(f"kept: {place}; `patchkit chat --patch {place}` talks to it")
