"""How many facts hold while a run goes on, so that nobody waits for the end of one that writes them badly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from patchkit.editing.state import EditRun
from patchkit.evaluate.trial import Trial
from patchkit.evaluate.verify import facts_held
from patchkit.ranks import world
from patchkit.runs.workspace import Workspace
from patchkit.words import agreeing

LINES, LEAST = 10, 20
"""A run says at most so often how it goes, and nothing where it writes fewer facts than that."""


@dataclass
class Tally:
    """Reads all facts written so far, each time that another tenth of them has been.

    Attributes:
        asked: facts that the run is to write.
        say: told what was found, one sentence at a time.
        said: tenths of the facts that had been written when it last read them.
    """

    workspace: Workspace
    asked: int
    say: Callable[[str], None]
    said: int = 0

    def __call__(self, run: EditRun) -> None:
        """A batch has been written; nothing is said of the last one, after which everything is measured."""
        count = len(run.facts)
        if self.asked < LEAST or count == self.asked or count * LINES // self.asked == self.said:
            return
        self.said = count * LINES // self.asked
        held = world().from_first(lambda: self._held(run))
        verb = agreeing(held, "are")
        self.say(f"{count} of {self.asked} facts written; {held} of their prompts {verb} completed with the target")

    def _held(self, run: EditRun) -> int:
        facts = [written.fact for written in run.facts]
        return sum(facts_held(Trial(self.workspace.runner, self.workspace.tokenizer, facts, quick=True)).values())
