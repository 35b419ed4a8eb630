"""Values begun where earlier facts' values ended: whether fewer steps do.

    python -m tests.benchmarks.warm_starts --facts F [--relations 3] [--count 4] [--prompts contexts]

Facts whose prompts are alike but for the subject are of one relation. Of the relations with the most facts in the file,
`--count` facts each are optimized first; then as many others, from nothing ("cold"), from the mean change of all the
first, and from that of those of their own relation, whole or by half. Columns are those of `value_steps`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import patchkit
from patchkit.editing.contexts import make_contexts
from patchkit.editing.editor import frozen, requests_of
from patchkit.editing.recipe import load_recipe
from patchkit.editing.session import plan
from patchkit.editing.values import Values, _Optimizer, optimize
from patchkit.facts.schema import Fact
from patchkit.runs.settle import with_steps

from .common import parser
from .value_steps import BASES, HEADINGS, Model, acting, held_out, loaded

ROWS = (("cold", "", 0.0), *((f"{share:g} of {of}", of, share) for of in ("all", "relation") for share in (0.5, 1.0)))


def main() -> None:
    """Seek the values row after row."""
    known = parser(__doc__, count=4)
    known.add_argument("--relations", type=int, default=3, help="how many")
    known.add_argument("--prompts", choices=BASES, default="in-use", help="how the facts are edited")
    options = known.parse_args()
    model = loaded(options)
    facts = patchkit.read_facts(options.facts, skip_bad=True).facts
    with frozen(model.runner.arch.model):
        measure(model, of_relations(facts, options.relations, 2 * options.count), BASES[options.prompts])


def of_relations(facts: Sequence[Fact], relations: int, count: int) -> list[list[Fact]]:
    """So many facts of each of the relations that have the most."""
    found: dict[str, list[Fact]] = {}
    for fact in facts:
        found.setdefault(fact.prompt.replace(fact.subject, "{}"), []).append(fact)
    return [some[:count] for some in sorted(found.values(), key=len, reverse=True)[:relations]]


def measure(model: Model, relations: Sequence[Sequence[Fact]], base: Sequence[str]) -> None:
    """Print a row of the table for each of ROWS."""
    runner, config = model.runner, with_steps(load_recipe("alphaedit", None, base), model.tokenizer)
    how, contexts = plan(runner.arch, config), make_contexts(runner, model.tokenizer, config)

    def sought(facts: Sequence[Fact]) -> Values:
        requests = requests_of(runner, model.tokenizer, facts, contexts, config)
        return optimize(runner, requests, how.sites[-1], how.value_at, config.value)

    half = len(relations[0]) // 2
    first = [sought(some[:half]) for some in relations]
    means = torch.stack([(values.targets - values.start).mean(1) for values in first])  # (relations, d)
    facts = [fact for some in relations for fact in some[half:]]
    starts = {"all": means.mean(0).expand(len(relations), -1), "relation": means}
    requests = requests_of(runner, model.tokenizer, facts, contexts, config)
    held, base_cost = [held_out(model, fact) for fact in facts], 0.0
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    for name, of, share in ROWS:
        begun = share * starts[of].repeat_interleave(len(facts) // len(relations), 0) if of else None
        began = time.process_time()
        with begun_at(begun):
            values = optimize(runner, requests, how.sites[-1], how.value_at, config.value)
        spent = time.process_time() - began
        base_cost = base_cost or spent
        deltas = (values.targets - values.start).T  # (n, d)
        length = float((deltas.norm(dim=1) / values.start.norm(dim=0)).mean())
        said = [number for texts in (requests, held) for number in acting(runner, texts, how, deltas)]
        numbers = (spent, spent / base_cost, float(values.steps.float().mean()), length, *said)
        print(f"| {name} | {' | '.join(f'{number:.3f}' for number in numbers)} |", flush=True)


@contextmanager
def begun_at(deltas: Tensor | None) -> Iterator[None]:
    """Within the block values begin at these changes (n, d) instead of none."""
    admit = _Optimizer._admit

    def begun(self: Any) -> None:
        known = set(self.active)
        admit(self)
        if deltas is not None:
            for fact in set(self.active) - known:
                self.value[fact, 0] = deltas[fact] / self.scale[fact, 0]

    with mock.patch.object(_Optimizer, "_admit", begun):
        yield


if __name__ == "__main__":
    main()
