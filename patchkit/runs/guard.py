"""The guard of a run: after batches it asks whether the model is still one, and ends the run where it is not.

Long sequences of edits end in collapse: norms grow, plain text gets unlikely, answers become loops (Gupta et al. 2024,
arXiv 2401.07453). A patch from before that is worth more than one from after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean

from patchkit.editing.state import EditRun, EditState, base_weight
from patchkit.errors import InputError, given_twice
from patchkit.evaluate import wording
from patchkit.evaluate.answers import Ask, Said, answer, fits
from patchkit.evaluate.divergence import as_said, divergences
from patchkit.model.forward import LayerRunner
from patchkit.ranks import world
from patchkit.runs.workspace import Workspace
from patchkit.statistics.corpus import default_text, read_corpus

TEXT_TOKENS, TEXT_WINDOW, ANSWER_TOKENS = 384, 128, 24
EVERY = 10
"""Facts after which the guard looks at everything again; after every batch it looks at what costs little."""
GLANCE_TOKENS, SUSPECT, STIR = 128, 0.5, 0.25
"""What it reads of the text after every batch; which stands for the whole while it has moved by less than SUSPECT of
the bound; and has everything looked at where it has moved by STIR of the bound since that was done."""
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
    kl: float = 0.2
    answers: float = 0.5

    @classmethod
    def of(cls, given: Sequence[str]) -> Bounds:
        """From "kl=0.1" and the like.

        Raises:
            InputError: another name, one that is given twice, or not a number above 0.
        """
        found: dict[str, float] = {}
        for each in given:
            name, _, number = each.partition("=")
            if name in found:
                other = next(other for other in given if other.startswith(f"{name}="))
                raise given_twice(f"--guard {each}", f"--guard {other}")
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
        batch: how many of them the last batch had.
        reason: why it ended the run, if it did, with the facts written by then.
        message: of a run that it ended, in words for the user.
    """

    workspace: Workspace
    bounds: Bounds = Bounds()
    kept: EditRun = field(init=False)
    looked_at: int = field(default=0, init=False)
    batch: int = field(default=0, init=False)
    reason: str = field(default="", init=False)
    message: str = field(default="", init=False)
    _text: Mapping[Ask, Said] = field(default_factory=dict)
    _answers: Mapping[Ask, Said] = field(default_factory=dict)
    _growth: dict[int, float] = field(default_factory=dict, init=False)
    _asked: _Asked = field(init=False)

    def read_base(self) -> None:
        """What the untouched base says, to compare with; before anything is attached to it."""
        if not world().first or self._text:
            return
        runner, tokenizer, model = self.workspace.runner, self.workspace.tokenizer, self.workspace.model
        text = default_text(str(model.config._name_or_path), "eval")
        self._text = as_said(runner, read_corpus(text, tokenizer, TEXT_TOKENS, TEXT_WINDOW).windows)
        asks = [Ask(question) for question in QUESTIONS]
        asks = [ask for ask in asks if fits(runner, tokenizer, ask, ANSWER_TOKENS)]
        self._answers = answer(runner, tokenizer, dict.fromkeys(asks, ANSWER_TOKENS))

    def afresh(self) -> Guard:
        """A guard for another run on the same base, which need not be read again."""
        return replace(self)

    def begin(self, run: EditRun) -> None:
        """Before the first batch."""
        self.looked_at, self.reason, self.message = 0, "", ""
        self.kept, self._growth = run.copy(), norm_growth(self.workspace.runner, run.state, run.state.sites)
        self._asked = _Asked(self.kept)

    def stops(self, run: EditRun, last: bool) -> bool:
        """Look; where all is well, that is what is kept from now on. Of a run in which answers are spoiled, what is
        kept is from when they were last asked for."""
        self.reason, asked = world().from_first(lambda: self._fault(run, last))
        self.batch, self.looked_at = len(run.facts) - self.looked_at, len(run.facts)
        if self.reason:
            self.kept = self._asked.kept if asked else self.kept
            return True
        if not last:
            self.kept = run.copy()
            self._asked = replace(self._asked, kept=self.kept) if asked else self._asked
        return False

    def tell(self, asked: int, advice: Sequence[str]) -> None:
        """Put into words after how many edits it stopped, why, what is kept, and what to do. `asked`: facts in all."""
        count, together = len(self.kept.facts), 1 < self.batch == self.looked_at
        none = f"{'they were one batch, so that ' * together}none is kept and nothing is written"
        kept = {0: none, 1: "the first one is kept"}.get(count, f"the first {count} are kept")
        stopped = f"guard: after {self.looked_at} of {asked} facts {self.reason}; {kept}"
        self.message = f"{stopped}. Try {'; or '.join(advice)}"

    def _fault(self, run: EditRun, last: bool) -> tuple[str, bool]:
        """What is past its bound, empty if nothing is; and whether the questions were asked."""
        for growth in self.growth(run).values():
            if not growth <= self.bounds.norm:  # nor where it is no number
                return f"an edited weight has {growth:.3g} times its norm (bound {self.bounds.norm:g})", False
        glance = self.moved(GLANCE_TOKENS)
        due = last or len(run.facts) - self._asked.facts >= EVERY
        due = due or not glance - self._asked.moved < STIR * self.bounds.kl
        moved = self.moved() if due or not glance <= SUSPECT * self.bounds.kl else glance
        if not moved <= self.bounds.kl:
            return f"plain text has moved by {moved:.3g} nats per token (bound {self.bounds.kl:g})", False
        if not due:
            return "", False
        self._asked = replace(self._asked, facts=len(run.facts), moved=glance)
        spoiled = self.spoiled()
        if spoiled > self.bounds.answers:
            return f"{spoiled:.0%} of unrelated answers are empty or loop (bound {self.bounds.answers:.0%})", True
        return "", True

    @property
    def grown(self) -> bool:
        """Whether an edited weight is past its bound, or no number."""
        return any(not growth <= self.bounds.norm for growth in self._growth.values())

    def growth(self, run: EditRun) -> Mapping[int, float]:
        """By layer, ‖W'‖/‖W‖ of its edited weight; only of those edited since the last look is it computed."""
        new = {layer for written in run.facts[self.looked_at :] for layer in written.layers}
        self._growth |= norm_growth(self.workspace.runner, run.state, new & {*run.state.sites})
        return self._growth

    def moved(self, tokens: int | None = None) -> float:
        """KL(base ‖ model as it is now), nats per token of the plain text, or of so many tokens from the beginnings of
        all its windows."""
        each = tokens and max(1, tokens // len(self._text))
        read = {ask: replace(s, ids=s.ids[:each], states=s.states[:each]) for ask, s in self._text.items()}
        return fmean(divergences(self.workspace.runner, read).values())

    def spoiled(self) -> float:
        """Share of the unrelated answers that are empty or loop now, where the base's do not."""
        now = answer(self.workspace.runner, self.workspace.tokenizer, dict.fromkeys(self._answers, ANSWER_TOKENS))
        bad = [_spoiled(now[ask].text) and not _spoiled(before.text) for ask, before in self._answers.items()]
        return fmean(bad) if bad else 0.0


@dataclass(frozen=True)
class _Asked:
    """When the guard last looked at everything: facts written by then, how far a glance had the text moved, and the
    run as it was."""

    kept: EditRun
    facts: int = 0
    moved: float = 0.0


def _spoiled(text: str) -> bool:
    return not wording.words(text) or wording.loops(text)


def norm_growth(runner: LayerRunner, state: EditState, layers: Iterable[int]) -> dict[int, float]:
    """‖W'‖/‖W‖ (Frobenius) of the edited weights of some layers; NaN where one is not finite."""
    growth = dict[int, float]()
    for layer in layers:
        read = partial(base_weight, runner.arch.sites[layer])
        delta = state.sites[layer].delta(read)
        if delta is not None and delta.rank:
            weight = read()
            growth[layer] = float((weight + delta.dense()).norm() / weight.norm())
    return growth
