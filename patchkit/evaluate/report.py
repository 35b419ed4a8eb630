"""What measuring finds, as records: shares in 0..1, None where there was nothing to measure them on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

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


class Perplexity(BaseModel):
    """Perplexity of plain text on the base and with the patch."""

    model_config = ConfigDict(frozen=True)
    before: float
    after: float
    ratio: float


class Outcome(BaseModel):
    """What became of one fact: how the patched model continues its prompt, and whether the fact holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    says: str
    holds: bool


class FactReport(BaseModel):
    """One fact: probabilities are geometric means over the target's tokens; `says` is the greedy continuation.

    more: what the groups of metrics with an instrument of their own found for it, by group and name.
    """

    model_config = ConfigDict(frozen=True)
    id: str
    prompt: str
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
    more: dict[str, dict[str, Any]] = {}

    @property
    def holds(self) -> bool:
        """Whether the fact is there after the edit: what a tick in a table stands for."""
        return bool(self.efficacy.exact)

    @property
    def outcome(self) -> Outcome:
        """What a manifest keeps of the fact."""
        return Outcome(says=self.says_after, holds=self.holds)


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
    """What `patchkit verify --json` prints."""

    per_fact: tuple[FactReport, ...]

    def summary(self) -> dict[str, Any]:
        """Everything but the single facts."""
        return self.model_dump(mode="json", exclude={"per_fact"})

    def outcomes(self) -> dict[str, Outcome]:
        """What became of each fact, by its id."""
        return {fact.id: fact.outcome for fact in self.per_fact}
