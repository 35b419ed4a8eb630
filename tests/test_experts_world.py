"""Fifty facts into the embedded mixture of experts, one by one and in a batch, beside the embedded dense model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from patchkit.bench.records import Result
from tests.benchmarks.experts import EXAMPLES, elsewhere, line, most_chosen, rows, seeing, strongest, whole

EDITS = 50
ROWS = {
    "factworld": ("factworld", whole),
    "factworld-moe": ("factworld-moe", whole),
    "the strongest expert alone": ("factworld-moe", strongest),
    "the most chosen expert alone": ("factworld-moe", most_chosen),
}


@pytest.fixture(scope="module", params=[1, EDITS], ids=["one by one", "in a batch"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """AlphaEdit's row of each name. The test that is the first to ask for one waits for it: a row takes minutes, and
    all of them more than one test may."""
    out, batch = tmp_path_factory.mktemp("bench"), int(request.param)

    @cache
    def made(name: str) -> Result:
        model, kept = ROWS[name]
        with seeing(kept):
            row = rows(model, "alphaedit", out / name, EDITS, batch)
        others = elsewhere(out / name, row, EXAMPLES / "world.jsonl")
        print(line(f"{name}, {batch} at a time", row, others), flush=True)
        return row

    return made


@pytest.mark.slow
def test_the_mixture_holds_fifty_facts(found: Callable[[str], Result]) -> None:
    row = found("factworld-moe")
    assert (row.generalization.success or 0) >= 0.9
    assert (row.locality.unchanged or 0) >= 0.85
    assert row.perplexity is not None
    assert row.perplexity.ratio <= 1.05
    assert (row.value("routing", "text") or 0) >= 0.92


@pytest.mark.slow
def test_they_hold_word_for_word(found: Callable[[str], Result]) -> None:
    assert (found("factworld-moe").efficacy.exact or 0) >= 0.95


@pytest.mark.slow
def test_it_is_as_good_as_the_dense_model(found: Callable[[str], Result]) -> None:
    assert (found("factworld-moe").score or 0) >= (found("factworld").score or 0) - 0.03


@pytest.mark.slow
def test_all_experts_of_a_fact_are_better_than_its_strongest_one(found: Callable[[str], Result]) -> None:
    assert (found("factworld-moe").score or 0) > (found("the strongest expert alone").score or 0)


@pytest.mark.slow
@pytest.mark.parametrize("found", [EDITS], ids=["in a batch"], indirect=True)
def test_all_experts_are_better_than_the_one_that_most_facts_go_to(found: Callable[[str], Result]) -> None:
    assert (found("factworld-moe").score or 0) > (found("the most chosen expert alone").score or 0) + 0.1
