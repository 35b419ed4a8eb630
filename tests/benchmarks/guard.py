"""What the guard sees of sound runs and of runs that collapse: the table of docs/report.md that its bounds are from.

    python -m tests.benchmarks.guard --facts F [--skip N] [--count 50] [--batch-size 1] [--at 10,25,50] [--model M]
        [--text T] [--row METHOD[:KEY=VALUE[,KEY=VALUE]] ...]

A guard that stops nothing looks after every batch. At some numbers of facts a line says what it sees, and beside it
what has become of the facts so far: how many are still completed with their targets, and how many of their neighbors
are as they were. Below stands after how many facts plain text had moved past some bounds, and what the looks cost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

import torch

from patchkit.editing.recipe import load_recipe
from patchkit.editing.state import EditRun
from patchkit.evaluate.readings import read_targets
from patchkit.facts.limits import Limits
from patchkit.facts.reader import parse_facts, read_facts
from patchkit.facts.schema import Fact, Pair
from patchkit.model.loading import load_model
from patchkit.runs.execute import run
from patchkit.runs.guard import GLANCE_TOKENS, Guard
from patchkit.runs.prepare import prepare
from patchkit.runs.workspace import Workspace
from tests.benchmarks.common import parser

ROWS = ("alphaedit", "memit:prompts=contexts", "rome:prompts=contexts", "ft")
HEADINGS = ("row", "facts", "norm", "text KL", "at a glance", "answers spoiled", "facts hold", "neighbors as before")
BOUNDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


@dataclass
class Watch(Guard):
    """Looks and never stops.

    Attributes:
        row: what is edited, for the lines.
        at: numbers of facts after which a line is printed.
        base: what the base says at the facts' neighbors.
        passed: by bound, after how many facts plain text had moved past it.
        spent: seconds of its own, and of what it would not have done as a guard.
    """

    row: str = ""
    at: Sequence[int] = ()
    base: dict[Pair, tuple[int, ...]] = field(default_factory=dict)
    passed: dict[float, int] = field(default_factory=dict)
    spent: float = 0.0
    beside: float = 0.0

    def stops(self, run: EditRun, last: bool) -> bool:
        """Look as the guard does, and then at everything."""
        began = time.process_time()
        super().stops(run, last)
        self.reason, looked = "", time.process_time()
        self.spent += looked - began
        count, moved = len(run.facts), self.moved()
        for bound in BOUNDS:
            if not moved <= bound:
                self.passed.setdefault(bound, count)
        if last or count in self.at:
            self._line(run, moved)
        self.beside += time.process_time() - looked
        return False

    def _line(self, run: EditRun, moved: float) -> None:
        space, facts = self.workspace, [written.fact for written in run.facts]
        said = read_targets(space.runner, space.tokenizer, [fact.pair(fact.prompt) for fact in facts])
        near = read_targets(space.runner, space.tokenizer, neighbors(facts))
        cells = (
            *(self.row, f"{len(facts)}", f"{max(self.growth(run).values(), default=1.0):.3f}", f"{moved:.3f}"),
            *(f"{self.moved(GLANCE_TOKENS):.3f}", f"{self.spoiled():.0%}"),
            f"{fmean(each.exact for each in said.values()):.0%}",
            f"{fmean(each.argmax == self.base[pair] for pair, each in near.items()):.0%}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def neighbors(facts: Sequence[Fact]) -> list[Pair]:
    """The neighbors of facts, each with what is to be read there."""
    return list(
        dict.fromkeys((near.prompt, near.target or fact.target_new) for fact in facts for near in fact.locality)
    )


def main() -> None:
    """Edit row after row."""
    known = parser(__doc__, count=50)
    known.add_argument("--skip", type=int, default=0, help="facts at the beginning of the file to leave out")
    known.add_argument("--batch-size", type=int, default=1)
    known.add_argument("--at", default="10,25,50,100,200,500,1000")
    known.add_argument("--text", help="plain text for the statistics")
    known.add_argument("--row", dest="rows", action="append", metavar="METHOD[:KEY=VALUE,...]")
    options = known.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, options.device)
    facts = read_facts(options.facts, skip_bad=True).facts[options.skip : options.skip + options.count]
    space = Workspace.of(loaded.model, loaded.tokenizer, (options.text,))
    near = read_targets(space.runner, space.tokenizer, neighbors(facts))
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    for row in options.rows or ROWS:
        method, _, settings = row.partition(":")
        overrides = [*(settings.split(",") if settings else ()), f"batch_size={options.batch_size}"]
        config, began = load_recipe(method, None, overrides), time.process_time()
        ready = prepare(partial(parse_facts, facts), space.tokenizer, config, limits=Limits.of(loaded.model.config))
        watch = Watch(space, row=row, at=[int(each) for each in options.at.split(",")])
        watch.base = {pair: each.argmax for pair, each in near.items()}
        run(ready, space, guard=watch, allow_close_keys=True)
        whole = time.process_time() - began - watch.beside
        past = ", ".join(f"{bound:g} after {count}" for bound, count in watch.passed.items()) or "none of the bounds"
        print(f"{row}: past {past}; the guard took {watch.spent:.1f} of {whole:.1f} CPU s", flush=True)


if __name__ == "__main__":
    main()
