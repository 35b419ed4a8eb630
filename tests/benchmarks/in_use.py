"""What people meet of an edit, by how it is made: the tables of docs/in_use.md.

    python -m tests.benchmarks.in_use --facts F [--skip 2000] [--count 8] [--model M] [--text T] [--eval-text E]
        [--row METHOD[:KEY=VALUE[,KEY=VALUE]] ...] [--raw 20]

All facts are edited in one batch. Rows with the same prompts share their values. Where layers are located, the row
names those that were found. `--raw` prints so many answers and texts of each row as they are, before and after, to be
read before its rates are believed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import torch

import patchkit
from patchkit.editing.recipe import LOCATE
from patchkit.editing.session import ValueCache
from patchkit.editing.teacher import SURE, sure_of
from patchkit.evaluate.report import Report
from patchkit.evaluate.wording import loops
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import LoadedModel, load_model
from tests.benchmarks.common import parser

ROWS = ("alphaedit:prompts=contexts", "alphaedit", "memit")
RATES = ("asked", "asked_system", "asked_turns", "asked_reworded", "overfit", "fluency", "loops", "unrelated")
OTHERS = ("loops of the base", "exact", "paraphrases exact", "those that ask", "neighbors", "perplexity", "score")
HEADINGS = ("row", *RATES, *OTHERS, "CPU s a fact")


def options_of(description: str | None) -> argparse.Namespace:
    """The options of the command."""
    known = parser(description, count=8)
    known.add_argument("--skip", type=int, default=0, help="facts at the beginning of the file to leave out")
    known.add_argument("--text", help="plain text for the statistics")
    known.add_argument("--eval-text", help="plain text for the perplexity")
    known.add_argument("--row", dest="rows", action="append", metavar="METHOD[:KEY=VALUE,...]")
    known.add_argument("--raw", type=int, default=0, help="answers and texts to print of each row")
    return known.parse_args()


def main() -> None:
    """Edit and measure row after row."""
    options = options_of(__doc__)
    torch.set_num_threads(options.threads)
    loaded, cache = load_model(options.model, options.device), ValueCache()
    read = patchkit.read_facts(options.facts, skip_bad=True).facts
    facts = read[options.skip : options.skip + options.count]
    asking = that_ask(loaded, facts)
    print(f"{len(asking)} of {sum(len(fact.paraphrases) for fact in facts)} paraphrases ask for the fact")
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    for row in options.rows or ROWS:
        method, _, settings = row.partition(":")
        overrides, began = settings.split(",") if settings else [], time.process_time()
        patch = patchkit.apply(
            loaded.model, loaded.tokenizer, facts, method, overrides=overrides, text=options.text, values=cache
        )
        spent = (time.process_time() - began) / len(facts)
        report = patchkit.measure(loaded.model, loaded.tokenizer, patch, text=options.eval_text)
        name = named(row, patch.manifest.history[-1].layers)
        print(f"| {' | '.join(cells(name, report, asking, spent))} |", flush=True)
        for line in list(raw(report))[: options.raw]:
            print(line)


def named(row: str, layers: Sequence[int]) -> str:
    """The row, and if it leaves its layers to tracing, those that were edited."""
    return f"{row} ({', '.join(map(str, layers))})" if f"layers={LOCATE}" in row else row


def that_ask(loaded: LoadedModel, facts: Sequence[patchkit.Fact]) -> set[tuple[str, str]]:
    """Facts' ids and paraphrases after which the base comes to the target when it is told the fact. Half of
    CounterFact's do not ask ("Babe Ruth's greatest weakness is", for the sport he plays): an edit that has its target
    there fails *overfit*."""
    pairs = [(fact, text) for fact in facts for text in fact.paraphrases if fact.subject in text]
    sure = sure_of(LayerRunner(inspect_model(loaded.model)), loaded.tokenizer, pairs)
    return {(fact.id, text) for (fact, text), probability in zip(pairs, sure, strict=True) if probability >= SURE}


def cells(row: str, report: Report, asking: set[tuple[str, str]], spent: float) -> list[str]:
    """The row of the table."""
    rates = [report.more["in_use"].get(name) for name in RATES]
    passages = [said for fact in report.per_fact for said in fact.more["in_use"]["about"]]
    held = [each.exact for fact in report.per_fact for each in fact.paraphrases if (fact.id, each.prompt) in asking]
    others = [
        fmean(loops(each["before"]) for each in passages) if passages else None,
        *(report.efficacy.exact, report.generalization.exact, fmean(held) if held else None),
        *(report.locality.unchanged, report.perplexity.ratio if report.perplexity else None),
    ]
    numbers = (*rates, *others, score(report))
    return [row, *("-" if number is None else f"{number:.3f}" for number in numbers), f"{spent:.1f}"]


def score(report: Report) -> float | None:
    """The harmonic mean of asked, paraphrases exact, 1 - overfit, fluency, neighbors unchanged and unrelated."""
    found = report.more["in_use"]
    overfit, fluency = found.get("overfit"), found.get("fluency")
    parts = [
        *(found.get("asked"), report.generalization.exact, report.locality.unchanged, found.get("unrelated")),
        None if overfit is None else 1 - overfit,
        None if fluency is None else min(1.0, fluency),
    ]
    known = [part for part in parts if part is not None]
    return len(known) / sum(1 / max(part, 0.01) for part in known) if known else None


def raw(report: Report) -> Iterator[str]:
    """What the base and the patched model said, fact by fact, then in answers that have nothing to do with them."""
    for fact in report.per_fact:
        for kind, texts in fact.more.get("in_use", {}).items():
            yield from _said(f"{fact.id} {kind}", texts)
    yield from _said("unrelated", report.details.get("in_use", {}).get("unrelated", ()))


def _said(name: str, texts: Any) -> Iterator[str]:
    for text in texts if isinstance(texts, Sequence) and not isinstance(texts, str) else ():
        if isinstance(text, dict) and "after" in text:
            yield f"    {name}: {text.get('text', text.get('question'))!r}"
            yield f"        before: {text.get('before')!r}\n        after:  {text['after']!r}"


if __name__ == "__main__":
    main()
