"""How much of an edit acts at names like its subject's: those that end as it does, and others of its kind.

    python -m tests.benchmarks.namesakes --model M [--text wiki_stats.txt] [--alone]

For each name in `NAMES`, its share of the edit about the subject: 1 is what acts in the
rows that the fact is edited in, 0 is silence. "Own" is the share at the subject in sentences that are no such rows.
Values are sought for one step alone, as a neuron's share does not hang on what is written. All facts are written in one
batch, or with --alone each in a patch of its own; in the first column names count next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch as replaced

import torch
from torch import Tensor

import patchkit
from patchkit.editing import neurons
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
    "Isaac Newton": ("Charles Darwin", "Albert Einstein", "Marie Curie"),
    "Jean-Paul Sartre": ("Albert Camus", "Michel Foucault"),
    "The iPhone": ("The iPad", "The Kindle"),
    "The Eiffel Tower": ("The Colosseum", "The CN Tower"),
    "Nepal": ("Bhutan", "India"),
    "Volvo": ("Saab", "Toyota"),
    "Johann Sebastian Bach": ("Ludwig van Beethoven", "Franz Schubert"),
}


def main() -> None:
    """Edit a fact about each subject, twice, and print the shares."""
    known = parser(__doc__)
    known.add_argument("--text", help="of the statistics")
    known.add_argument("--alone", action="store_true", help="a patch for each subject")
    options = known.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model, options.device)
    together = [[subject] for subject in NAMES] if options.alone else [list(NAMES)]
    found = [shares(model, together, part, options.text) for part in (1e-9, 1.0)]
    print("| name | names do not count | as it is |\n| --- | --- | --- |")
    for name, before in found[0].items():
        print(f"| {name} | {before:.2f} | {found[1][name]:.2f} |")


def shares(model: LoadedModel, together: Sequence[Sequence[str]], part: float, text: str | None) -> Mapping[str, float]:
    """Those of all names, with their mean and that of the subjects themselves, where names count `part` of what they
    do."""
    own, found = list[float](), dict[str, float]()
    for subjects in together:
        made = edited(model, subjects, part, text)
        own += [acting(model, made, subject, subject) for subject in subjects]
        found |= {name: acting(model, made, subject, name) for subject in subjects for name in NAMES[subject]}
    return {**found, "mean of these": sum(map(abs, found.values())) / len(found), "own": sum(own) / len(own)}


def edited(model: LoadedModel, subjects: Sequence[str], part: float, text: str | None) -> patchkit.Patch:
    """A patch with a fact about each subject."""
    records = [{"prompt": f"The color of {s} is", "subject": s, "target_new": "green"} for s in subjects]
    settings = ("prompts=in-use", "neurons=on", "value.steps=1")
    with ExitStack() as changed:
        for name in ("GATE", "AMOUNT"):
            own = getattr(neurons, name)
            changed.enter_context(replaced.object(neurons, name, replace(own, names=part * own.names)))
        return patchkit.apply(
            model.model,
            model.tokenizer,
            parse_facts(records).facts,
            "alphaedit",
            overrides=settings,
            text=text,
            allow_close_keys=True,
        )


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
