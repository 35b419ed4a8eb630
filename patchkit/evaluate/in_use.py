"""What people meet of an edit: whether it holds when asked, and what it does to other talk, near and far."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from patchkit.evaluate import wording
from patchkit.evaluate.answers import Ask, Said
from patchkit.evaluate.divergence import divergences
from patchkit.evaluate.interview import FORMS, Form, Interview, Talk
from patchkit.evaluate.report import Asked
from patchkit.evaluate.trial import Found, Trial
from patchkit.facts.schema import Fact


@dataclass(frozen=True)
class Base:
    """What the base says, and what when it is told the facts before."""

    said: Talk
    told: Mapping[Ask, Said]


class InUse:
    """The instrument of the group in_use."""

    def base(self, trial: Trial) -> Base:
        """What the base says, asked once."""
        interview = Interview(trial)
        return Base(interview.talk(), interview.told())

    def patched(self, trial: Trial, base: Base) -> Found:
        """What the model as it now is makes of the same; the base itself is not asked again."""
        interview = Interview(trial)
        return _Judgment(interview, base, base.said if trial.untouched else interview.talk()).found()


def asked_alone(trial: Trial) -> dict[str, bool]:
    """By fact whether its first question, asked alone, is answered with the target; without those that do not fit."""
    interview = Interview(trial)
    said = interview.first_answers()
    return {each.fact.id: wording.holds(said[each.ask].text, _targets(each.fact)) for each in interview.first_questions}


# --- single answers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """A question about a fact, both answers, and whether the second holds the target."""

    fact: str
    form: Form
    question: str
    before: str
    after: str
    holds: bool


@dataclass(frozen=True)
class _Passage:
    """A neutral text as three models go on with it: the base, the base told the fact, and the patched one."""

    fact: str
    text: str
    before: str
    told: str
    after: str
    blurts: bool
    loops: bool
    kl: float


@dataclass(frozen=True)
class _Other:
    """An unrelated text, and both answers."""

    text: str
    before: str
    after: str
    same: bool
    kl: float


# --- rates ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judgment:
    """The rates of one model's answers, with the base's beside them."""

    interview: Interview
    base: Base
    said: Talk

    def found(self) -> Found:
        """All of them, with what they stand on."""
        measured = {
            "asked": _by_fact([answer for answer in self.answers if answer.form in FORMS], "holds"),
            **{f"asked_{form}": self._of_form(form) for form in (*FORMS, "reworded")},
            "overfit": _by_fact(self.passages, "blurts"),
            "overfit_kl": _by_fact(self.passages, "kl"),
            "fluency": (self.fluency["fluency"], len(self.passages)),
            "consistency": (self.consistency["consistency"], len(self.passages)),
            "loops": _by_fact(self.passages, "loops"),
            "unrelated": (_mean([other.same for other in self.others]), len(self.others)),
            "unrelated_kl": (_mean([other.kl for other in self.others]), len(self.others)),
        }
        return Found(
            {name: value for name, (value, _) in measured.items()} | self.fluency | self.consistency,
            {name: count for name, (_, count) in measured.items()},
            self._per_fact(),
            self._first_answers(),
            {"unrelated": [asdict(other) for other in self.others]},
        )

    @cached_property
    def answers(self) -> list[_Answer]:
        """Those to every question."""
        found = []
        for question in self.interview.questions:
            before, after = (talk.questions[question.ask].text for talk in self._sides)
            holds = wording.holds(after, _targets(question.fact))
            found.append(_Answer(question.fact.id, question.form, question.text, before, after, holds))
        return found

    @cached_property
    def passages(self) -> list[_Passage]:
        """Every neutral text."""
        neutral, found = self.interview.neutral, []
        moved = self._moved(self.base.said.neutral, [each.ask for each in neutral])
        for each in neutral:
            before, after = (talk.neutral[each.ask].text for talk in self._sides)
            told, targets = self.base.told[each.told].text, _targets(each.fact)
            blurts = wording.mentions(after, targets) > 0 and wording.mentions(told, targets) == 0
            loops = wording.loops(after) and not wording.loops(before)
            found.append(_Passage(each.fact.id, each.ask.text, before, told, after, blurts, loops, moved[each.ask]))
        return found

    @cached_property
    def others(self) -> list[_Other]:
        """Every unrelated text."""
        moved, found = self._moved(self.base.said.unrelated, self.interview.unrelated), []
        for ask in self.interview.unrelated:
            before, after = (talk.unrelated[ask] for talk in self._sides)
            found.append(_Other(ask.text, before.text, after.text, before.ids == after.ids, moved[ask]))
        return found

    @cached_property
    def fluency(self) -> dict[str, float | None]:
        """How varied the words of the neutral texts are, with both sides; no variety is nothing to compare with."""
        before = _mean([wording.entropy(passage.before) for passage in self.passages])
        after = _mean([wording.entropy(passage.after) for passage in self.passages])
        ratio = after / before if before and after is not None else None
        return {"fluency": ratio, "fluency_before": before, "fluency_after": after}

    @cached_property
    def consistency(self) -> dict[str, float | None]:
        """How much both sides talk about each subject as the base does that is told the fact."""
        said = {kind: defaultdict[str, list[str]](list) for kind in ("told", "before", "after")}
        for passage in self.passages:
            for kind, by_fact in said.items():
                by_fact[passage.fact].append(getattr(passage, kind))
        told, before, after = ([" ".join(texts) for texts in by_fact.values()] for by_fact in said.values())
        return {
            "consistency": _mean(wording.consistency(after, told)),
            "consistency_before": _mean(wording.consistency(before, told)),
        }

    @property
    def _sides(self) -> tuple[Talk, Talk]:
        return self.base.said, self.said

    def _of_form(self, form: str) -> tuple[float | None, int]:
        return _by_fact([answer for answer in self.answers if answer.form == form], "holds")

    def _moved(self, said: Mapping[Ask, Said], asks: Sequence[Ask]) -> dict[Ask, float]:
        return divergences(self.interview.trial.runner, {ask: said[ask] for ask in asks})

    def _first_answers(self) -> dict[str, Asked]:
        """By fact that to its first question, asked alone."""
        answers, found = dict(zip(self.interview.questions, self.answers, strict=True)), {}
        for question in self.interview.first_questions:
            said = answers[question]
            found[said.fact] = Asked(
                question=said.question,
                prompted=not question.ask.message,
                before=said.before,
                after=said.after,
                holds=said.holds,
            )
        return found

    def _per_fact(self) -> dict[str, dict[str, Any]]:
        """Everything that was said, by fact."""
        found: dict[str, dict[str, Any]] = {}
        for name, rows in (("asked", self.answers), ("about", self.passages)):
            for row in rows:
                said = asdict(row)
                found.setdefault(said.pop("fact"), {"asked": [], "about": []})[name].append(said)
        return found


def _targets(fact: Fact) -> tuple[str, ...]:
    return (fact.target_new, *fact.aliases)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _by_fact(rows: Sequence[_Answer] | Sequence[_Passage], what: str) -> tuple[float | None, int]:
    """The mean over facts of each fact's mean, and of how many."""
    groups = defaultdict[str, list[float]](list)
    for row in rows:
        groups[row.fact].append(getattr(row, what))
    return _mean([fmean(group) for group in groups.values()]), len(rows)
