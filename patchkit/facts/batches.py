"""Which facts are solved for together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from patchkit.facts.schema import Fact


def batches(facts: Sequence[Fact], size: int) -> Iterator[range]:
    """Places of facts that follow one another and are solved for together, `size` of them at most.

    Neighbors with the same `case` are never parted, so that a case of more than `size` facts is a larger batch of its
    own; unless facts are solved for one by one.
    """
    first, end = 0, 0
    for count in _undivided(facts) if size > 1 else [1] * len(facts):
        if end > first and end + count - first > size:
            yield range(first, end)
            first = end
        end += count
    if end > first:
        yield range(first, end)


def _undivided(facts: Sequence[Fact]) -> Iterator[int]:
    """How many facts follow one another that belong together: those of a case, and any other fact alone."""
    for case, group in groupby(facts, key=lambda fact: fact.case):
        count = sum(1 for _ in group)
        yield from [count] if case is not None else [1] * count
