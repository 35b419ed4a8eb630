"""What a model is asked to see what people meet of an edit: about the facts, about their subjects, and of other things.

Every text is written greedily, up to its natural end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from patchkit.evaluate import prompts
from patchkit.evaluate.answers import Ask, Said, answer, fits, is_chat
from patchkit.evaluate.trial import Trial
from patchkit.facts.schema import Fact
from patchkit.facts.text import continuation

ANSWER_TOKENS, ABOUT_TOKENS = 30, 25
Form = Literal["alone", "system", "turns", "reworded"]
FORMS: tuple[Form, ...] = ("alone", "system", "turns")
"""The forms in which every question is asked."""
MOST_REWORDED = 2


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
class Talk:
    """What one model says to all of it."""

    questions: Mapping[Ask, Said]
    neutral: Mapping[Ask, Said]
    unrelated: Mapping[Ask, Said]


@dataclass(frozen=True)
class Interview:
    """All that a model is asked about the facts of `trial`, but for what has more tokens than it has positions."""

    trial: Trial

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """Each fact's questions, or else its prompt, in three forms, and its paraphrases asked so."""
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

    def talk(self) -> Talk:
        """What the model as it now is says to all of it."""
        questions = {question.ask: ANSWER_TOKENS for question in self.questions}
        neutral = {neutral.ask: ABOUT_TOKENS for neutral in self.neutral}
        said = self._said(neutral | questions)  # together: a pass costs more than its rows do
        return Talk(
            {ask: said[ask] for ask in questions},
            {ask: said[ask] for ask in neutral},
            self._said(dict.fromkeys(self.unrelated, ANSWER_TOKENS)),  # of its own, the same whatever the facts
        )

    def told(self) -> dict[Ask, Said]:
        """What it says of the subjects when it is told the facts before."""
        return self._said({neutral.told: ABOUT_TOKENS for neutral in self.neutral})

    def first_answers(self) -> dict[Ask, Said]:
        """What it says to the first questions alone."""
        return self._said({question.ask: ANSWER_TOKENS for question in self.first_questions})

    def _fits(self, ask: Ask, tokens: int) -> bool:
        return fits(self.trial.runner, self.trial.tokenizer, ask, tokens)

    def _said(self, asks: Mapping[Ask, int]) -> dict[Ask, Said]:
        return answer(self.trial.runner, self.trial.tokenizer, asks)


def _questions(fact: Fact, chat: bool) -> Iterator[Question]:
    for text in fact.questions or (fact.prompt,):
        for form in FORMS:
            yield Question(fact, form, text, _asked(text, form, chat or bool(fact.questions)))
    for text in fact.paraphrases[:MOST_REWORDED]:
        yield Question(fact, "reworded", text, _asked(text, "alone", chat))


def _asked(text: str, form: Form, message: bool) -> Ask:
    """A question as a message; a prompt for a model that goes on with texts and no more, after other text."""
    if not message:
        before = {"system": prompts.PLAIN_SYSTEM, "turns": prompts.PLAIN_TALK}.get(form)
        return Ask(f"{before} {text}" if before else text, message=False)
    if form == "system":
        return Ask(text, system=prompts.SYSTEM)
    return Ask(text, turns=prompts.TURNS) if form == "turns" else Ask(text)


def _neutral(fact: Fact, chat: bool) -> Iterator[Neutral]:
    """The fact's own texts, or fixed ones; none where the prompt stands for a subject that is not known."""
    told = f"{fact.asked}{continuation(fact.asked, fact.target_new, fact.joint(fact.asked))}."
    known = fact.names_subject
    beginnings = fact.about or (tuple(text.format(fact.subject) for text in prompts.ABOUT_BEGINNINGS) if known else ())
    for text in beginnings:
        yield Neutral(fact, Ask(text, message=False), Ask(f"{told} {text}", message=False))
    for text in prompts.ABOUT_MESSAGES if chat and known else ():
        message = text.format(fact.subject)
        yield Neutral(fact, Ask(message), Ask(f"{told} {message}"))
