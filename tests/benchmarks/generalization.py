"""Which contexts make an edit hold in other words, at what cost: the table of docs/generalization.md.

    python tests/benchmarks/generalization.py FACTS --model MODEL [--skip 1000] [--limit 24] [--method alphaedit]
        [--text TEXT] [--eval-text TEXT] [--only NAME ...] [--set KEY=VALUE ...]

Every row edits the same facts in one batch of the default recipe with other contexts or settings, and measures them
as `patchkit verify` does. "is a": the share of facts whose target now also follows "{subject} is a", that is, how far
an edit says its target whatever the words. Choose on facts that no published figure is taken from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

from transformers import AutoModelForCausalLM, AutoTokenizer

import patchkit
from patchkit.editing import editor
from patchkit.editing.contexts import make_contexts, texts_before
from patchkit.facts.reader import parse_facts
from patchkit.facts.requests import ESSENCE, SUBJECT
from patchkit.facts.schema import Fact

HEADINGS = (
    "contexts",
    "efficacy exact",
    "paraphrases success",
    "paraphrases exact",
    "neighbors unchanged",
    "perplexity",
    '"is a"',
    "steps",
    "values",
)
Contexts = Callable[[list[str], list[str]], list[str]]  # the default contexts, and texts to put before prompts


def as_published(contexts: list[str], before: list[str]) -> list[str]:
    """Generated texts before the prompt, as in ROME."""
    return ["", *before]


def without_texts(contexts: list[str], before: list[str]) -> list[str]:
    """The words about the subject with nothing before them."""
    return [context[context.find(SUBJECT) :] if SUBJECT in context else context for context in contexts]


def by_default(contexts: list[str], before: list[str]) -> list[str]:
    """As they are."""
    return contexts


def mixed(texts: int, contexts: list[str], before: list[str]) -> list[str]:
    """The prompt alone and after that many texts, and the last of the words about the subject."""
    return ["", *before[:texts], *contexts[texts + 1 :]]


VARIANTS: dict[str, tuple[Contexts, tuple[str, ...]]] = {
    "the prompt alone": (lambda contexts, before: contexts[:1], ()),
    "5 texts before the prompt": (as_published, ()),
    "the same, further: stop_loss 0.02": (as_published, ("stop_loss=0.02",)),
    "the same, longer: clamp 1.5": (as_published, ("stop_loss=0.02", "clamp=1.5")),
    "1 text, 2 about the subject": (lambda contexts, before: contexts[:4], ()),
    "2 texts, 3 about the subject": (partial(mixed, 2), ()),
    "3 texts, 2 about the subject": (partial(mixed, 3), ()),
    "4 texts, 1 about the subject": (partial(mixed, 4), ()),
    "1 text, 4 about the subject (default)": (by_default, ()),
    "the same, no texts before them": (without_texts, ()),
    "default, 10 steps": (by_default, ("steps=10",)),
    "default, clamp 1.5": (by_default, ("clamp=1.5",)),
    "default, sweeps 2": (by_default, ("sweeps=2",)),
}


def mean(values: Iterable[float | None]) -> float:
    """Over the facts that have a value."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def row(model: Any, tokenizer: Any, facts: Sequence[Fact], name: str, options: argparse.Namespace) -> str:
    """One line of the table."""
    change, settings = VARIANTS[name]
    with replaced.object(editor, "make_contexts", lambda *given: change(make_contexts(*given), texts_before(*given))):
        made = patchkit.apply(
            model, tokenizer, facts, options.method, overrides=[*settings, *options.set], text=options.text
        )
    prompts = {ESSENCE.format(fact.subject): fact for fact in facts}
    leaks = [Fact(id=p, prompt=p, subject=f.subject, target_new=f.target_new) for p, f in prompts.items()]
    report = patchkit.measure(model, tokenizer, made, [*facts, *leaks], text=options.eval_text)
    found, leaked = report.per_fact[: len(facts)], report.per_fact[len(facts) :]
    assert report.perplexity is not None
    cells = [
        name,
        f"{mean(fact.efficacy.exact for fact in found):.2f}",
        f"{mean(fact.generalization.success_or_exact for fact in found):.2f}",
        f"**{mean(fact.generalization.exact for fact in found):.2f}**",
        f"{mean(fact.locality.unchanged for fact in found):.2f}",
        f"{report.perplexity.ratio:.3f}",
        f"{mean(fact.efficacy.exact for fact in leaked):.2f}",
        f"{mean(fact.steps for fact in made.manifest.facts):.0f}",
        f"{made.manifest.history[-1].seconds['values']:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", type=Path, help="JSONL")
    parser.add_argument("--model", required=True)
    parser.add_argument("--skip", type=int, default=0, help="lines left out at the start")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--method", default="alphaedit")
    parser.add_argument("--text", help="text for the statistics")
    parser.add_argument("--eval-text", help="text for the perplexity")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, metavar="NAME", help="these rows, in this order")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="on top of every row")
    options = parser.parse_args(arguments)
    lines = options.facts.read_text(encoding="utf-8").splitlines()[options.skip :][: options.limit]
    facts = parse_facts([json.loads(line) for line in lines]).facts
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    print(f"| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}", flush=True)
    for name in options.only or VARIANTS:
        print(row(model, tokenizer, facts, name, options), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
