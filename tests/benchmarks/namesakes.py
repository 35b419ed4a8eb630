"""How much of an edit acts at names that end as its subject's do, with and without having met such names.

    python -m tests.benchmarks.namesakes --model M [--text wiki_stats.txt]

For each name in `NAMES`, none of which an edit has met, its share of the edit about the subject: 1 is what acts in the
rows that the fact is edited in, 0 is silence. "Own" is the share at the subject in sentences that are no such rows.
Values are sought for one step alone, as a neuron's share does not hang on what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from unittest.mock import patch as replaced

import torch
from torch import Tensor

import patchkit
from patchkit.editing.neurons import NAMESAKE_WEIGHT
from patchkit.facts.reader import parse_facts
from patchkit.maths.linalg import Delta
from patchkit.model.arch import inspect_model
from patchkit.model.loading import LoadedModel, load_model

from .common import parser

FRAMES = ("The question is about {}", "Yesterday I read of {}")
NAMES = {
    "The 2032 Summer Olympics": ("The 2024 Summer Olympics", "The 2012 Summer Olympics", "The 2026 Winter Olympics"),
    "Inês Carvalho": ("Elena Carvalho", "João Carvalho"),
    "Jimi Hendrix": ("Leon Hendrix",),
    "Ottokar Brandt": ("Willy Brandt",),
    "the Norwick helpdesk": ("the library helpdesk", "the night helpdesk"),
    "The Blue Nile": ("The White Nile",),
    "Penicillin": ("Amoxicillin",),
    "Foundry Denfen": ("House Denfen", "Banco Denfen"),
    "Famhurst": ("Marhurst", "Velhurst"),
}


def main() -> None:
    """Edit a fact about each subject, twice, and print the shares."""
    known = parser(__doc__)
    known.add_argument("--text", help="of the statistics")
    options = known.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model, options.device)
    found = [shares(model, weight, options.text) for weight in (1e-12, NAMESAKE_WEIGHT)]
    print("| name | share | having met namesakes |\n| --- | --- | --- |")
    for name, before in found[0].items():
        print(f"| {name} | {before:.2f} | {found[1][name]:.2f} |")


def shares(model: LoadedModel, weight: float, text: str | None) -> Mapping[str, float]:
    """Those of all names, with their mean and that of the subjects themselves."""
    facts = parse_facts([{"prompt": f"The color of {s} is", "subject": s, "target_new": "green"} for s in NAMES]).facts
    settings = ("prompts=in-use", "neurons=on", "value.steps=1")
    with replaced("patchkit.editing.neurons.NAMESAKE_WEIGHT", weight):
        made = patchkit.apply(
            model.model, model.tokenizer, facts, "alphaedit", overrides=settings, text=text, allow_close_keys=True
        )
    own = [acting(model, made, subject, subject) for subject in NAMES]
    found = {name: acting(model, made, subject, name) for subject, names in NAMES.items() for name in names}
    return {**found, "mean of these": sum(found.values()) / len(found), "own": sum(own) / len(own)}


def acting(model: LoadedModel, made: patchkit.Patch, subject: str, name: str) -> float:
    """The share of the edit about the subject that acts at the end of a name."""
    fact = next(fact for fact in made.manifest.facts if fact.subject == subject)
    layer = (fact.layers or made.manifest.history[-1].layers)[-1]
    site = inspect_model(model.model).sites[layer]
    written, keys = made.updates[f"{site.module_name}.weight"][-1], list[Tensor]()
    assert isinstance(written, Delta)
    assert fact.neuron is not None
    note = site.module.register_forward_pre_hook(lambda module, args: keys.append(args[0][0, -1]))
    with torch.no_grad(), made.attached(model.model), note:
        for frame in FRAMES:
            model.model(**model.tokenizer(frame.format(name), return_tensors="pt"))
    heard = written.right[:, fact.neuron]  # of each fact of the layer, and only this one is written there
    return float(torch.stack(keys)[:, fact.neuron].mean() * heard[heard.abs().argmax()])


if __name__ == "__main__":
    main()
