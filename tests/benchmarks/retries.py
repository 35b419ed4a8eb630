"""When to edit facts again that do not hold: after each batch, or at the end of the run. The table of docs/report.md.

    python -m tests.benchmarks.retries --facts F [--skip N] [--count 60] [--batch-size 20] [--model M] [--text T]
        [--set KEY=VALUE ...] [--ask]

Either way they are taken out and edited once more, as `patchkit apply` does. After each batch, later facts are written
beside the second edit; at the end, what later batches have undone is edited again as well. Without `--ask` a fact holds
where its prompt is completed with the target; with it, its question has to be answered, too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch

import patchkit
from patchkit.editing.recipe import EditConfig, load_recipe
from patchkit.facts.limits import Limits
from patchkit.facts.reader import parse_facts, read_facts
from patchkit.facts.schema import Fact
from patchkit.model.loading import load_model
from patchkit.patch.patch import Patch
from patchkit.runs.execute import run
from patchkit.runs.prepare import Prepared, prepare
from patchkit.runs.retry import Retried, retried
from patchkit.runs.workspace import Workspace
from tests.benchmarks.common import parser

HEADINGS = ("edited again", "how many", "facts hold", "paraphrases", "neighbors as before", "perplexity", "CPU s")


def main() -> None:
    """Edit the same facts three times."""
    known = parser(__doc__, count=60)
    known.add_argument("--skip", type=int, default=0, help="facts at the beginning of the file to leave out")
    known.add_argument("--batch-size", type=int, default=20)
    known.add_argument("--text", help="plain text for the statistics")
    known.add_argument("--ask", action="store_true", help="ask for the facts, too")
    options = known.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, options.device)
    facts = read_facts(options.facts, skip_bad=True).facts[options.skip : options.skip + options.count]
    space = Workspace.of(loaded.model, loaded.tokenizer, (options.text,))
    config = load_recipe(options.method, None, [*options.set, f"batch_size={options.batch_size}"])
    made = Runs(space, config, not options.ask)
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    began = time.process_time()
    ready = made.prepared(facts)
    once = run(ready, space, allow_close_keys=True)
    show("never", space, Retried(once), time.process_time() - began, options.ask)
    show("at the end", space, made.again(ready, once), time.process_time() - began, options.ask)
    began = time.process_time()
    show("after each batch", space, made.as_it_goes(facts), time.process_time() - began, options.ask)


class Runs:
    """Runs with the same recipe on the same model."""

    def __init__(self, space: Workspace, config: EditConfig, quick: bool) -> None:
        self.space, self.config, self.quick = space, config, quick

    def prepared(self, facts: Sequence[Fact], onto: Patch | None = None) -> Prepared:
        """A run of some facts."""
        limits = Limits.of(self.space.model.config)
        return prepare(partial(parse_facts, facts), self.space.tokenizer, self.config, onto, limits=limits)

    def again(self, ready: Prepared, patch: Patch) -> Retried:
        """The facts of a run that do not hold edited again, as `apply` does."""
        return retried(ready, self.space, patch, None, self.quick, lambda note: None)

    def as_it_goes(self, facts: Sequence[Fact]) -> Retried:
        """Batch after batch, each with its facts edited again that do not hold."""
        patch, done = None, list[str]()
        for first in range(0, len(facts), self.config.batch_size):
            ready = self.prepared(facts[first : first + self.config.batch_size], patch)
            second = self.again(ready, run(ready, self.space, allow_close_keys=True))
            patch, done = second.patch, [*done, *second.facts]
        assert patch is not None
        return Retried(patch, tuple(done))


def show(when: str, space: Workspace, made: Retried, spent: float, ask: bool) -> None:
    """One line of the table."""
    report = patchkit.measure(space.model, space.tokenizer, made.patch, quick=not ask)
    assert report.perplexity is not None
    held = sum(each.holds if ask else each.efficacy.exact == 1 for each in report.per_fact)
    cells = (
        *(when, f"{len(made.facts)}", f"{held} of {report.facts}", f"{report.generalization.exact or 0:.1%}"),
        *(f"{report.locality.unchanged or 0:.1%}", f"{report.perplexity.ratio:.4f}", f"{spent:.0f}"),
    )
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
