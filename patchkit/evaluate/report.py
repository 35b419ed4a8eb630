"""What measuring finds, as records: shares in 0..1, None where there was nothing to measure them on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from patchkit.evaluate.texts import NeighborReport, ParaphraseReport, Perplexity
from patchkit.words import beginning, first_words, in_short

Counts = dict[str, dict[str, int]]
"""On how many items each number stands: counts["efficacy"]["exact"] facts."""


class Rates(BaseModel):
    """How often a model completes prompts with the target, by three measures; see `patchkit.evaluate.metrics`."""

    model_config = ConfigDict(frozen=True)
    success: float | None
    exact: float | None
    generated: float | None

    @property
    def success_or_exact(self) -> float | None:
        """success, or exact where no fact has a target_true to compare with."""
        return self.exact if self.success is None else self.success


class LocalityRates(BaseModel):
    """How often neighbors stay as they were, by two measures."""

    model_config = ConfigDict(frozen=True)
    success: float | None
    unchanged: float | None


class Outcome(BaseModel):
    """What became of one fact: what the patched model says, and whether the fact holds.

    question: what it says that to; None means that it goes on with the fact's prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    says: str
    holds: bool
    question: str | None = None


def said(outcome: Outcome, target: str) -> str:
    """What a model says as tables show it: of an answer the beginning, of a prompt gone on with as many words as the
    target has and one more; "-" for nothing."""
    if outcome.question is None:
        return first_words(outcome.says, target) or "-"
    return beginning(outcome.says) or "-"


class Asked(BaseModel):
    """A fact's first question, asked alone, and the answers of the base and of the patched model.

    prompted: the fact's prompt stands for a question, and the model went on with it as plain text.
    """

    model_config = ConfigDict(frozen=True)
    question: str
    prompted: bool
    before: str
    after: str
    holds: bool


class Why(BaseModel):
    """Why a fact does not hold, and what to try; `by` is the fact that broke it, where one did."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["never learned", "not in other words", "broken", "lost"]
    because: str
    advice: str
    by: str | None = None


class FactReport(BaseModel):
    """One fact: probabilities are geometric means over the target's tokens; `says` is the greedy continuation.

    more: what the groups of metrics with an instrument of their own found for it, by group and name; asked: what came
    of asking for it, None where that was left out; why: why it does not hold, where it is one of the patch's own.
    """

    model_config = ConfigDict(frozen=True)
    id: str
    prompt: str
    subject: str = ""
    target_new: str
    target_true: str | None
    says_before: str
    says_after: str
    probability_before: float
    probability_after: float
    efficacy: Rates
    generalization: Rates
    locality: LocalityRates
    counts: Counts = {}
    paraphrases: tuple[ParaphraseReport, ...] = ()
    neighbors: tuple[NeighborReport, ...] = ()
    more: dict[str, dict[str, Any]] = {}
    asked: Asked | None = None
    why: Why | None = None

    @property
    def holds(self) -> bool:
        """Whether the fact is there after the edit, what a tick in a table stands for: its first question, asked alone,
        is answered with the target; where nothing was asked, its prompt is continued with it, token by token."""
        return self.asked.holds if self.asked else bool(self.efficacy.exact)

    @property
    def in_short(self) -> str:
        """Its id, with what it says; a report of an earlier version has no subject, for which the prompt stands."""
        return in_short(self.id, self.subject or self.prompt, self.target_new)

    @property
    def outcome(self) -> Outcome:
        """What a manifest keeps of the fact."""
        return self._outcome(self.asked.after if self.asked else self.says_after)

    @property
    def outcome_before(self) -> Outcome:
        """The same of the base, but for `holds`, which is of the patched model."""
        return self._outcome(self.asked.before if self.asked else self.says_before)

    def _outcome(self, says: str) -> Outcome:
        asked = self.asked and not self.asked.prompted and self.asked.question
        return Outcome(says=says, holds=self.holds, question=asked or None)


class Summary(BaseModel):
    """Everything but the single facts, as a manifest keeps it.

    more: the values of groups of metrics with an instrument of their own, by group and name.
    """

    model_config = ConfigDict(frozen=True)
    facts: int
    efficacy: Rates
    generalization: Rates
    locality: LocalityRates
    perplexity: Perplexity | None
    counts: Counts = {}
    more: dict[str, dict[str, float | None]] = {}

    def value(self, group: str, name: str) -> float | None:
        """One number by its path; None where it was not measured."""
        found = getattr(self, group) if group in Summary.model_fields else self.more.get(group)
        return found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)

    def count(self, group: str, name: str) -> int | None:
        """On how many items it stands; None where that was not noted."""
        return self.counts.get(group, {}).get(name)


class Report(Summary):
    """What `patchkit verify --json` prints.

    details: what the groups of metrics found that belongs to no fact, by group.
    """

    per_fact: tuple[FactReport, ...]
    details: dict[str, Any] = {}

    def summary(self) -> dict[str, Any]:
        """Everything but single facts and texts."""
        return self.model_dump(mode="json", include=set(Summary.model_fields))

    def outcomes(self) -> dict[str, Outcome]:
        """What became of each fact, by its id."""
        return {fact.id: fact.outcome for fact in self.per_fact}
