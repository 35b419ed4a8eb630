"""What people meet of an edit: whether it holds when asked, and what it does to other talk, near the subject and far.

Every text is written greedily, up to its natural end, once by the base and once with the patch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

from patchkit.evaluate import prompts, wording
from patchkit.evaluate.answers import Ask, Said, answer, fits, is_chat
from patchkit.evaluate.divergence import divergences
from patchkit.evaluate.metrics import Found, Trial
from patchkit.evaluate.report import Asked
from patchkit.facts.schema import Fact
from patchkit.facts.text import continuation

ANSWER_TOKENS = 30
ABOUT_TOKENS = 25
Form = Literal["alone", "system", "turns"]
FORMS: tuple[Form, ...] = ("alone", "system", "turns")


# --- what is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question about a fact in one of its forms."""

    fact: Fact
    form: Form
    text: str
    ask: Ask


@dataclass(frozen=True)
class Neutral:
    """A text about a fact's subject, and the same for a model that is told the fact first."""

    fact: Fact
    ask: Ask
    told: Ask


@dataclass(frozen=True)
class Interview:
    """All that a model is asked about the facts of `trial`, but for what has more tokens than it has positions."""

    trial: Trial

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """Each fact's questions, or else its prompt, in three forms."""
        chat = is_chat(self.trial.tokenizer)
        every = [question for fact in self.trial.facts for question in _questions(fact, chat)]
        return tuple(question for question in every if self._fits(question.ask, ANSWER_TOKENS))

    @property
    def first_questions(self) -> tuple[Question, ...]:
        """Each fact's first question, asked alone."""
        alone = (question for question in reversed(self.questions) if question.form == "alone")
        return tuple({question.fact.id: question for question in alone}.values())

    @cached_property
    def neutral(self) -> tuple[Neutral, ...]:
        """Texts about the facts' subjects."""
        chat = is_chat(self.trial.tokenizer)
        every = [neutral for fact in self.trial.facts for neutral in _neutral(fact, chat)]
        return tuple(neutral for neutral in every if self._fits(neutral.told, ABOUT_TOKENS))

    @cached_property
    def unrelated(self) -> tuple[Ask, ...]:
        """What has nothing to do with them."""
        every = [Ask(text) for text in prompts.UNRELATED_QUESTIONS]
        every += [Ask(text, message=False) for text in prompts.UNRELATED_BEGINNINGS]
        return tuple(ask for ask in every if self._fits(ask, ANSWER_TOKENS))

    def answers(self) -> Answers:
        """What the model as it now is says to all of it."""
        return Answers(
            self._said([question.ask for question in self.questions], ANSWER_TOKENS),
            self._said([neutral.ask for neutral in self.neutral], ABOUT_TOKENS),
            self._said(self.unrelated, ANSWER_TOKENS),  # a batch of its own, the same for all facts
        )

    def base(self) -> Base:
        """The same of the base, with what it says when told the facts."""
        return Base(self.answers(), self._said([neutral.told for neutral in self.neutral], ABOUT_TOKENS))

    def _fits(self, ask: Ask, tokens: int) -> bool:
        return fits(self.trial.runner, self.trial.tokenizer, ask, tokens)

    def _said(self, asks: Sequence[Ask], tokens: int) -> dict[Ask, Said]:
        return answer(self.trial.runner, self.trial.tokenizer, asks, tokens)


def _questions(fact: Fact, chat: bool) -> Iterator[Question]:
    for text in fact.questions or (fact.prompt,):
        for form in FORMS:
            yield Question(fact, form, text, _asked(text, form, chat or bool(fact.questions)))


def _asked(text: str, form: Form, message: bool) -> Ask:
    """A question as a message; a prompt for a model that goes on with texts and no more, after other text."""
    if not message:
        before = {"alone": "", "system": prompts.PLAIN_SYSTEM, "turns": prompts.PLAIN_TALK}[form]
        return Ask(f"{before} {text}" if before else text, message=False)
    if form == "system":
        return Ask(text, system=prompts.SYSTEM)
    return Ask(text, turns=prompts.TURNS) if form == "turns" else Ask(text)


def _neutral(fact: Fact, chat: bool) -> Iterator[Neutral]:
    """The fact's own texts, or fixed ones; none where the prompt stands for a subject that is not known."""
    told = f"{fact.prompt}{continuation(fact.prompt, fact.target_new, fact.separator)}."
    known = fact.subject != fact.prompt
    beginnings = fact.about or (tuple(text.format(fact.subject) for text in prompts.ABOUT_BEGINNINGS) if known else ())
    for text in beginnings:
        yield Neutral(fact, Ask(text, message=False), Ask(f"{told} {text}", message=False))
    for text in prompts.ABOUT_MESSAGES if chat and known else ():
        message = text.format(fact.subject)
        yield Neutral(fact, Ask(message), Ask(f"{told} {message}"))


# --- what is answered -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What one model says."""

    questions: Mapping[Ask, Said]
    neutral: Mapping[Ask, Said]
    unrelated: Mapping[Ask, Said]


@dataclass(frozen=True)
class Base:
    """What the base says, and what when it is told the fact before."""

    said: Answers
    told: Mapping[Ask, Said]


class InUse:
    """The instrument of the group in_use."""

    def base(self, trial: Trial) -> Base:
        """What the base says to all of it, asked once."""
        return Interview(trial).base()

    def patched(self, trial: Trial, base: Base) -> Found:
        """What the model as it now is makes of the same; the base itself is not asked again."""
        interview = Interview(trial)
        said = base.said if trial.untouched else interview.answers()
        return _Judgement(interview, base, said).found()


def asked_alone(trial: Trial) -> dict[str, bool]:
    """By fact whether its first question, asked alone, is answered with the target; without those that do not fit."""
    first = Interview(trial).first_questions
    said = answer(trial.runner, trial.tokenizer, [question.ask for question in first], ANSWER_TOKENS)
    return {each.fact.id: wording.holds(said[each.ask].text, _forms(each.fact)) for each in first}


# --- what that is worth -----------------------------------------------------------------------------------------------

_Row = dict[str, Any]


@dataclass(frozen=True)
class _Judgement:
    """The rates of one model's answers, with the base's beside them."""

    interview: Interview
    base: Base
    said: Answers

    def found(self) -> Found:
        """All of them, with what they stand on."""
        questions, neutral, unrelated = self.questions, self.neutral, self.unrelated
        values, counts = dict[str, float | None](), dict[str, int]()
        shares: tuple[tuple[str, Iterable[_Row], str], ...] = (
            ("asked", questions, "holds"),
            *((f"asked_{form}", [row for row in questions if row["form"] == form], "holds") for form in FORMS),
            ("overfit", neutral, "blurts"),
            ("overfit_kl", neutral, "kl"),
            ("loops", neutral, "loops"),
        )
        for name, rows, what in shares:
            values[name], counts[name] = _by_fact(rows, what), len(list(rows))
        for name, what in (("unrelated", "same"), ("unrelated_kl", "kl")):
            values[name], counts[name] = _mean([row[what] for row in unrelated]), len(unrelated)
        values |= self.fluency()
        counts["fluency"] = len(neutral)
        return Found(values, counts, _per_fact(questions, neutral), self.asked(), {"unrelated": unrelated})

    @cached_property
    def questions(self) -> list[_Row]:
        """Every question, with both answers."""
        rows = []
        for question in self.interview.questions:
            before, after = (said.questions[question.ask].text for said in (self.base.said, self.said))
            row = {"form": question.form, "question": question.text, "before": before, "after": after}
            rows.append({"fact": question.fact.id, **row, "holds": wording.holds(after, _forms(question.fact))})
        return rows

    @cached_property
    def neutral(self) -> list[_Row]:
        """Every neutral text, as three models go on with it: the base, the base told the fact, and this one."""
        neutral, rows = self.interview.neutral, []
        kl = self._moved(self.base.said.neutral, [each.ask for each in neutral])
        for each in neutral:
            before, after = (said.neutral[each.ask].text for said in (self.base.said, self.said))
            told, forms = self.base.told[each.told].text, _forms(each.fact)
            row = {"fact": each.fact.id, "text": each.ask.text, "before": before, "told": told, "after": after}
            blurts = wording.mentions(after, forms) > 0 and wording.mentions(told, forms) == 0
            loops = wording.loops(after) and not wording.loops(before)
            rows.append({**row, "blurts": blurts, "loops": loops, "kl": kl[each.ask]})
        return rows

    @cached_property
    def unrelated(self) -> list[_Row]:
        """Every unrelated text, with both answers."""
        asks, rows = self.interview.unrelated, []
        kl = self._moved(self.base.said.unrelated, asks)
        for ask in asks:
            before, after = self.base.said.unrelated[ask], self.said.unrelated[ask]
            row = {"text": ask.text, "before": before.text, "after": after.text}
            rows.append({**row, "same": before.ids == after.ids, "kl": kl[ask]})
        return rows

    def fluency(self) -> dict[str, float | None]:
        """How varied the neutral texts are, with both sides; 0 entropy is nothing to compare with."""
        asks = [each.ask for each in self.interview.neutral]
        before, after = (_mean([wording.entropy(said.neutral[ask].text) for ask in asks]) for said in self._sides())
        ratio = after / before if before and after is not None else None
        return {"fluency": ratio, "fluency_before": before, "fluency_after": after}

    def _moved(self, said: Mapping[Ask, Said], asks: Sequence[Ask]) -> dict[Ask, float]:
        return divergences(self.interview.trial.runner, {ask: said[ask] for ask in asks})

    def _sides(self) -> tuple[Answers, Answers]:
        return self.base.said, self.said

    def asked(self) -> dict[str, Asked]:
        """By fact its first question, asked alone."""
        rows = dict(zip(self.interview.questions, self.questions, strict=True))
        found = {}
        for question in self.interview.first_questions:
            kept = {name: rows[question][name] for name in ("question", "before", "after", "holds")}
            found[question.fact.id] = Asked(**kept, prompted=not question.ask.message)
        return found


def _forms(fact: Fact) -> tuple[str, ...]:
    return (fact.target_new, *fact.aliases)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _by_fact(rows: Iterable[_Row], what: str) -> float | None:
    """The mean over facts of each fact's mean."""
    groups = defaultdict[str, list[float]](list)
    for row in rows:
        groups[row["fact"]].append(row[what])
    return _mean([fmean(group) for group in groups.values()])


def _per_fact(questions: Sequence[_Row], neutral: Sequence[_Row]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, rows in (("asked", questions), ("about", neutral)):
        for row in rows:
            more = {key: value for key, value in row.items() if key != "fact"}
            found.setdefault(row["fact"], {"asked": [], "about": []})[name].append(more)
    return found
