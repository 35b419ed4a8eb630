"""Value targets by how they are sought: what they cost, and what they say where nobody optimized them.

    python -m tests.benchmarks.value_steps --facts F [--skip 2000] [--count 6] [--prompts contexts]
        [--row KEY=VALUE[,KEY=VALUE] ...]

They are those of edits in use, or with `--prompts contexts` of edits in the published form. The delta of each fact acts
at its subject, as its own neuron would have it, in texts that were optimized ("own") and in those that patches are
measured on ("held out"): questions alone, after a system prompt and after talk, paraphrases, and neutral texts. "Leak"
is the share of neutral texts in whose continuation by the base the target comes first somewhere. Nothing is solved or
written, so that a row takes a minute where `in_use` takes ten. "to the first" is the ratio of CPU seconds to those of
the first row, in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import patchkit
from patchkit.editing.contexts import make_contexts
from patchkit.editing.editor import frozen, requests_of
from patchkit.editing.recipe import load_recipe
from patchkit.editing.sampling import Sampling, sample
from patchkit.editing.session import Plan, plan
from patchkit.editing.suffixes import Suffixes
from patchkit.editing.value_problem import NO_TERMS, ValueProblem
from patchkit.editing.values import optimize
from patchkit.editing.wordings import KEPT
from patchkit.evaluate import prompts
from patchkit.facts.chat import ChatTemplate, chat_template
from patchkit.facts.requests import EditRequest, Row, essence_row, kept_row, wording_row
from patchkit.facts.schema import Fact
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import load_model
from patchkit.runs.settle import with_steps

from .common import parser

BASES = {"in-use": ["neurons=on"], "contexts": ["prompts=contexts"]}
"""By `--prompts`, the settings that all rows have."""
ROWS = ("", "value.second_moment=diagonal", "value.products=bfloat16")
HEADINGS = (
    "row",
    "CPU s",
    "to the first",
    "steps",
    "length",
    *(f"{w} {n}" for w in ("own", "held out") for n in ("loss", "exact", "KL", "leak")),
)


@dataclass(frozen=True)
class Model:
    """What all rows share."""

    runner: LayerRunner
    tokenizer: Any
    chat: ChatTemplate


def main() -> None:
    """Seek values row after row."""
    known = parser(__doc__, count=6)
    known.add_argument("--skip", type=int, default=0, help="facts at the beginning of the file to leave out")
    known.add_argument("--prompts", choices=BASES, default="in-use", help="how the facts are edited")
    known.add_argument("--row", dest="rows", action="append", metavar="KEY=VALUE,...")
    options = known.parse_args()
    model = loaded(options)
    facts = patchkit.read_facts(options.facts, skip_bad=True).facts[options.skip : options.skip + options.count]
    with frozen(model.runner.arch.model):
        measure(model, facts, options.rows or ROWS, BASES[options.prompts])


def loaded(options: argparse.Namespace) -> Model:
    """The model that is asked for, on so many threads."""
    torch.set_num_threads(options.threads)
    found = load_model(options.model, options.device)
    chat = chat_template(found.tokenizer)
    if chat is None:
        raise SystemExit(f"{options.model}: no chat template, so that nothing is edited in use by itself")
    return Model(LayerRunner(inspect_model(found.model)), found.tokenizer, chat)


def measure(model: Model, facts: Sequence[Fact], rows: Sequence[str], base: Sequence[str]) -> None:
    """Print a row of the table for each of `rows`, with the settings `base` in all of them."""
    config = load_recipe("alphaedit", None, base)
    how = plan(model.runner.arch, config)
    contexts = make_contexts(model.runner, model.tokenizer, config)
    requests = requests_of(model.runner, model.tokenizer, facts, contexts, config)
    held, first = [held_out(model, fact) for fact in facts], 0.0
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    for row in rows:
        chosen = with_steps(load_recipe("alphaedit", None, [*base, *filter(None, row.split(","))]), model.tokenizer)
        began = time.process_time()
        values = optimize(model.runner, requests, how.sites[-1], how.value_at, chosen.value)
        spent = time.process_time() - began
        first = first or spent
        deltas = (values.targets - values.start).T  # (n, d)
        length = float((deltas.norm(dim=1) / values.start.norm(dim=0)).mean())
        said = [number for texts in (requests, held) for number in acting(model.runner, texts, how, deltas)]
        numbers = (spent, spent / first, float(values.steps.float().mean()), length, *said)
        print(f"| {row or 'default'} | {' | '.join(f'{number:.3f}' for number in numbers)} |", flush=True)


def held_out(model: Model, fact: Fact) -> EditRequest:
    """The texts that the fact is measured on, as rows."""
    asked = [
        wording_row(fact, model.tokenizer, *split(model.chat.ask(question, *more), question))
        for question in ([q for q in fact.questions if fact.subject in q] or [fact.prompt])[:2]
        for more in ((), (prompts.SYSTEM,), (None, prompts.TURNS))
    ]
    asked += [wording_row(fact, model.tokenizer, "", text) for text in fact.paraphrases if fact.subject in text]
    texts = [("", text.format(fact.subject)) for text in prompts.ABOUT_BEGINNINGS]
    messages = [text.format(fact.subject) for text in prompts.ABOUT_MESSAGES]
    texts += [split(model.chat.ask(message), message) for message in messages]
    following = sample(model.runner, model.tokenizer, [a + b for a, b in texts], Sampling(KEPT))
    kept = [kept_row(fact, model.tokenizer, *text, ids) for text, ids in zip(texts, following, strict=True)]
    return EditRequest(
        fact, in_number([row for row in asked if row.subject]), essence_row(fact, model.tokenizer), tuple(kept)
    )


def split(whole: str, message: str) -> tuple[str, str]:
    """What comes before a message in a text, and the rest."""
    start = max(0, whole.rfind(message))
    return whole[:start], whole[start:]


def in_number(rows: Sequence[Row], count: int = 8) -> tuple[Row, ...]:
    """As many rows for every fact, which `Suffixes` wants: the first ones come again."""
    return tuple(rows[i % len(rows)] for i in range(count))


@torch.no_grad()
def acting(runner: LayerRunner, requests: Sequence[EditRequest], how: Plan, deltas: Tensor) -> tuple[float, ...]:
    """With the deltas (n, d): the mean target loss, the share of target tokens that come first, the mean KL from what
    the base goes on by in neutral texts, and the share of these in which the target comes first somewhere."""
    problem = ValueProblem(runner, how.sites[-1], how.value_at, NO_TERMS)
    sums, leaks = deltas.new_zeros(3), dict[int, bool]()
    for bucket in Suffixes(runner, requests, problem.start).buckets(range(len(requests))):
        none = deltas.new_zeros(len(bucket.row), 1, deltas.shape[1])
        base, edited = (problem.logits(bucket, rows) for rows in (none, deltas[bucket.fact_of.there].unsqueeze(1)))
        asked, _, kept = bucket.segments(edited)
        sums[0] += (F.cross_entropy(asked, bucket.label, reduction="none") * bucket.weight).sum()
        sums[1] += ((asked.argmax(-1) == bucket.label) * bucket.weight).sum()
        if len(kept):
            before, after = bucket.segments(base)[2].log_softmax(-1), kept.log_softmax(-1)
            divergence = F.kl_div(after, before, reduction="none", log_target=True).sum(-1)
            sums[2] += (divergence * bucket.kept.weight).sum()
            rows = bucket.row.known[bucket.segments(bucket.point_row.known)[2]]
            for row, first in zip(rows.tolist(), (kept.argmax(-1) == bucket.kept.target).tolist(), strict=True):
                leaks[row] = leaks.get(row, False) or first
    return *(sums / len(requests)).tolist(), sum(leaks.values()) / max(1, len(leaks))


if __name__ == "__main__":
    main()
