"""What instruments measure on, and what they give back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchkit.evaluate.report import Asked
    from patchkit.facts.schema import Fact
    from patchkit.model.forward import LayerRunner
    from patchkit.statistics.corpus import Corpus


@dataclass(frozen=True)
class Trial:
    """What an instrument measures: a model as it is at the moment, and the facts to ask it for.

    Attributes:
        corpus: plain text for the perplexity, if it is wanted.
        quick: leave out the groups that have a model write texts.
        untouched: the model is the base itself, so that nothing need be asked again.
    """

    runner: LayerRunner
    tokenizer: Any
    facts: Sequence[Fact]
    corpus: Corpus | None = None
    quick: bool = False
    untouched: bool = False


@dataclass(frozen=True)
class Found:
    """What an instrument found.

    Attributes:
        values: by the metric's name.
        counts: on how many items each value stands.
        per_fact: by the fact's id, whatever it found for a single fact.
        asked: what became of each fact when it was asked, by its id.
        details: what else belongs into a full report and to no fact.
    """

    values: Mapping[str, float | None]
    counts: Mapping[str, int] = field(default_factory=dict)
    per_fact: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    asked: Mapping[str, Asked] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
