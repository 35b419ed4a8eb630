"""What the benchmark writes down: one line of results.jsonl, and what decides its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import harmonic_mean
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from patchkit.evaluate.report import Report, Summary
from patchkit.evaluate.spread import intervals

UNEDITED = "unedited"
SHARES = ("acc_norm", "acc", "exact_match")
"""Metrics of lm-eval's that stand for a task, the first that it has; a task without any has its own first."""
Interval = tuple[float, float]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Setup(_Record):
    """Digests of everything that decides a row's numbers; `facts` is that of the facts measured in it."""

    model: str
    dtype: str
    facts: str
    text: str
    eval_text: str
    recipe: str | None


class Drift(_Record):
    """How much of itself a weight has gained (0.01) or lost (-0.01) in Frobenius norm, in condition number, and in its
    largest singular value (spectral); and what is told of the change (`patchkit.bench.health`).

    size: Frobenius norm of the change over that of the weight. effective_rank: of the change. overlap, activation: how
    much facts' changes have to do with one another; None where the change is not one of columns, one for each fact.
    angles: degrees by which the change turns the weight, the largest first, then deciles.
    """

    norm: float
    condition: float
    spectral: float | None = None
    size: float | None = None
    effective_rank: float | None = None
    overlap: float | None = None
    activation: float | None = None
    angles: tuple[float, ...] = ()

    @property
    def angle(self) -> float | None:
        """The largest of the angles."""
        return self.angles[0] if self.angles else None


class States(_Record):
    """How far hidden states at the end of prompts about other things have moved.

    prompts: how many. shift: by layer, the mean of ‖h' - h‖/‖h‖. before, after: by prompt, where the last layer's state
    lies in the plane in which the base's spread most.
    """

    prompts: int
    shift: tuple[float, ...]
    before: tuple[tuple[float, float], ...]
    after: tuple[tuple[float, float], ...]


class Ability(_Record):
    """What lm-eval says of one task (`patchkit.bench.abilities`).

    asked: the name it was asked for by. limit: of how many questions, the first ones; None of all. metric: which number
    stands for it, in lm-eval's notation, and value. numbers: all of them. version: of the task.
    """

    asked: str
    limit: int | None
    metric: str
    value: float
    stderr: float | None
    questions: int
    numbers: dict[str, float]
    version: str

    @property
    def interval(self) -> Interval | None:
        """1.96 standard errors on either side of the value, a share's within 0 and 1."""
        if self.stderr is None:
            return None
        low, high = self.value - 1.96 * self.stderr, self.value + 1.96 * self.stderr
        return (max(0.0, low), min(1.0, high)) if self.metric.split(",")[0] in SHARES else (low, high)


class Result(Summary):
    """One line of results.jsonl: a method after so many edits, measured on all facts edited so far.

    norm_change, condition_change: the largest among the edited weights, without sign; weights: each of them; bytes:
    size of patch.safetensors; rank: the largest of a weight's updates together; seconds: by phase, editing since the
    first fact; intervals: by a metric's key, where it lies in 95 of 100 samples of as many facts; shift: by layer, how
    far states have moved (`States`); text_kl: KL(base ‖ patched) on plain text, nats per token; judged: share of
    answers that a judge takes for right, and judge: the model that it was; abilities: by the names of lm-eval's tasks;
    score: harmonic mean of exact efficacy, generalization success (exact where no fact has a target_true) and unchanged
    locality.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    method: str
    edits: int
    score: float | None
    norm_change: float | None = None
    condition_change: float | None = None
    weights: dict[str, Drift] = Field(default_factory=dict)
    bytes: int | None = None
    rank: int | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    intervals: dict[str, Interval] = Field(default_factory=dict)
    shift: tuple[float, ...] = ()
    judged: float | None = None
    judge: str | None = None
    text_kl: float | None = None
    abilities: dict[str, Ability] = Field(default_factory=dict)
    setup: Setup

    @classmethod
    def of(
        cls, method: str, edits: int, report: Report, setup: Setup, weights: Mapping[str, Drift], **more: Any
    ) -> Result:
        """A row from what was found; `more` are its other fields."""
        return cls(
            method=method,
            edits=edits,
            score=score(report),
            norm_change=max((abs(drift.norm) for drift in weights.values()), default=None),
            condition_change=max((abs(drift.condition) for drift in weights.values()), default=None),
            weights=dict(weights),
            setup=setup,
            intervals=intervals(report),
            **report.model_dump(include=set(Summary.model_fields)),
            **more,
        )

    def with_abilities(self, found: Mapping[str, Ability]) -> Result:
        """The row with tasks of lm-eval beside those that it has, and their intervals with the others."""
        ranges = {f"ability_{name}": each.interval for name, each in found.items()}
        return self.model_copy(
            update={
                "abilities": {**self.abilities, **found},
                "intervals": {**self.intervals, **{key: each for key, each in ranges.items() if each}},
            }
        )


def score(report: Report) -> float | None:
    """Harmonic mean of exact efficacy, generalization success and unchanged locality; None where one is unknown."""
    parts = (report.efficacy.exact, report.generalization.success_or_exact, report.locality.unchanged)
    known = [part for part in parts if part is not None]
    return harmonic_mean(known) if len(known) == len(parts) else None
