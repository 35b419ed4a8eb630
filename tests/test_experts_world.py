"""Fifty facts into the embedded mixture of experts, one by one and in a batch, beside the embedded dense model."""

from __future__ import annotations

import pytest

from patchkit.bench.records import Result
from tests.benchmarks.experts import EXAMPLES, elsewhere, line, rows, seeing, strongest, whole

EDITS = 50


@pytest.fixture(scope="module", params=[1, EDITS], ids=["one by one", "in a batch"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """AlphaEdit's rows: the dense model's, the mixture's, and the mixture's with one expert edited alone."""
    out = tmp_path_factory.mktemp("bench")
    made = dict[str, Result]()
    for name, model, kept in (
        ("factworld", "factworld", whole),
        ("factworld-moe", "factworld-moe", whole),
        ("one expert", "factworld-moe", strongest),
    ):
        with seeing(kept):
            made[name] = row = rows(model, "alphaedit", out / name, EDITS, request.param)
        others = elsewhere(out / name, row, EXAMPLES / "world.jsonl")
        print(line(f"{name}, {request.param} at a time", row, others), flush=True)
    return made


@pytest.mark.slow
def test_the_mixture_holds_fifty_facts(found: dict[str, Result]) -> None:
    row = found["factworld-moe"]
    assert (row.generalization.success or 0) >= 0.9
    assert (row.locality.unchanged or 0) >= 0.85
    assert row.perplexity is not None
    assert row.perplexity.ratio <= 1.05
    assert (row.value("routing", "text") or 0) >= 0.92


@pytest.mark.slow
def test_they_hold_word_for_word(found: dict[str, Result], request: pytest.FixtureRequest) -> None:
    if "in a batch" in request.node.name:
        reason = "0.92 of these facts; of two other draws 0.96 and 1.00 (docs/experts.md)"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    assert (found["factworld-moe"].efficacy.exact or 0) >= 0.95


@pytest.mark.slow
def test_it_is_as_good_as_the_dense_model(found: dict[str, Result]) -> None:
    assert (found["factworld-moe"].score or 0) >= (found["factworld"].score or 0) - 0.03


@pytest.mark.slow
def test_all_experts_of_a_fact_are_better_than_its_strongest_one(found: dict[str, Result]) -> None:
    assert (found["factworld-moe"].score or 0) > (found["one expert"].score or 0)
