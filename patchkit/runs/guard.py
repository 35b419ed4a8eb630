"""The guard of a run: after batches it asks whether the model is still one, and ends the run where it is not.

Long sequences of edits end in collapse: norms grow, plain text gets unlikely, answers become loops (Gupta et al. 2024,
arXiv 2401.07453). A patch from before that is worth more than one from after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

from patchkit.editing.state import EditRun, base_weight
from patchkit.errors import InputError
from patchkit.evaluate import wording
from patchkit.evaluate.answers import Ask, Said, answer, fits
from patchkit.evaluate.divergence import as_said, divergences
from patchkit.model.forward import LayerRunner
from patchkit.ranks import world
from patchkit.runs.workspace import Workspace
from patchkit.statistics.corpus import default_text, read_corpus

TEXT_TOKENS, TEXT_WINDOW, ANSWER_TOKENS = 384, 128, 24
EVERY = 10
"""Facts after which the guard looks again; batches that are larger it looks at one by one."""
QUESTIONS = (
    "How many minutes are in an hour?",
    "Name a color of the rainbow.",
    "What can I do with leftover bread?",
    "Which animal says meow?",
    "Write a sentence about the sea.",
    "What is 7 plus 5?",
)
"""What the model is asked: about no fact, and none of the texts that edits are measured on."""


@dataclass(frozen=True)
class Bounds:
    """Past one of these a run ends.

    Attributes:
        norm: Frobenius norm of an edited output projection over the base's. What opens subjects' own neurons does not
            count: a gate's row is made long so that it fires at one subject alone.
        kl: KL(base ‖ edited) on plain text, nats per token.
        answers: share of the answers to unrelated questions that are empty or go round in circles, where the base's do
            not.
    """

    norm: float = 2.0
    kl: float = 0.5
    answers: float = 0.5

    @classmethod
    def of(cls, given: Sequence[str]) -> Bounds:
        """From "kl=0.1" and the like.

        Raises:
            InputError: another name, or not a number above 0.
        """
        found: dict[str, float] = {}
        for each in given:
            name, _, number = each.partition("=")
            try:
                found[name] = float(number)
            except ValueError:
                found[name] = math.nan
            if name not in cls.__dataclass_fields__ or not found[name] > 0:
                names = ", ".join(cls.__dataclass_fields__)
                raise InputError(f"--guard {each}: write name=number, such as kl=0.2, above 0; the names are {names}")
        return cls(**found)


@dataclass
class Guard:
    """The guard of one run.

    Attributes:
        kept: as `patchkit.editing.editor.Guard` has it.
        looked_at: facts that had been written when it last looked.
        reason: why it ended the run, if it did, with the facts written by then.
    """

    workspace: Workspace
    bounds: Bounds = Bounds()
    kept: EditRun = field(init=False)
    looked_at: int = 0
    reason: str = ""
    _text: Mapping[Ask, Said] = field(default_factory=dict)
    _answers: Mapping[Ask, Said] = field(default_factory=dict)

    def read_base(self) -> None:
        """What the untouched base says, to compare with; before anything is attached to it."""
        if not world().first:
            return
        runner, tokenizer, model = self.workspace.runner, self.workspace.tokenizer, self.workspace.model
        text = default_text(str(model.config._name_or_path), "eval")
        self._text = as_said(runner, read_corpus(text, tokenizer, TEXT_TOKENS, TEXT_WINDOW).windows)
        asks = [Ask(question) for question in QUESTIONS]
        asks = [ask for ask in asks if fits(runner, tokenizer, ask, ANSWER_TOKENS)]
        self._answers = answer(runner, tokenizer, asks, ANSWER_TOKENS)

    def begin(self, run: EditRun) -> None:
        """Before the first batch."""
        self.kept = run.copy()

    def stops(self, run: EditRun, last: bool) -> bool:
        """Look, unless only a few facts were written since; where all is well, that is what is kept from now on."""
        if not last and len(run.facts) - self.looked_at < EVERY:
            return False
        self.looked_at = len(run.facts)
        self.reason = world().from_first(lambda: self._fault(run))  # one process looks, and all do as it says
        if self.reason:
            return True
        if not last:
            self.kept = run.copy()
        return False

    def told(self, asked: int) -> str:
        """In words: after how many edits it stopped, why, what is kept, and what to do. `asked`: facts in all."""
        kept = f"the first {len(self.kept.facts)} are kept" if self.kept.facts else "none is kept"
        return (
            f"guard: after {self.looked_at} of {asked} facts {self.reason}; {kept}. Try a method that keeps more "
            "(alphaedit, mose), a smaller --batch-size, more text for the statistics (--text), or less strict bounds "
            "(--guard NAME=X, --no-guard)"
        )

    def _fault(self, run: EditRun) -> str:
        """What is past its bound; empty if nothing is."""
        growth = norm_growth(self.workspace.runner, run)
        if not growth <= self.bounds.norm:
            return f"an edited weight has {growth:.3g} times its norm (bound {self.bounds.norm:g})"
        moved = divergences(self.workspace.runner, self._text)
        kl = fmean(moved.values())
        if not kl <= self.bounds.kl:
            return f"plain text has moved by {kl:.3g} nats per token (bound {self.bounds.kl:g})"
        spoiled = self._spoiled()
        if spoiled > self.bounds.answers:
            return f"{spoiled:.0%} of unrelated answers are empty or loop (bound {self.bounds.answers:.0%})"
        return ""

    def _spoiled(self) -> float:
        now = answer(self.workspace.runner, self.workspace.tokenizer, list(self._answers), ANSWER_TOKENS)
        bad = [_spoiled(now[ask].text) and not _spoiled(before.text) for ask, before in self._answers.items()]
        return fmean(bad) if bad else 0.0


def _spoiled(text: str) -> bool:
    return not wording.words(text) or wording.loops(text)


def norm_growth(runner: LayerRunner, run: EditRun) -> float:
    """The largest ‖W'‖/‖W‖ (Frobenius) of the edited weights; NaN where one is not finite."""
    growth = [1.0]
    for layer, history in run.state.sites.items():
        read = partial(base_weight, runner.arch.sites[layer])
        delta = history.delta(read)
        if delta is not None and delta.rank:
            weight = read()
            growth.append(float((weight + delta.dense()).norm() / weight.norm()))
    return math.nan if any(map(math.isnan, growth)) else max(growth)
