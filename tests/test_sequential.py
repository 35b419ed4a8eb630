"""Fifty facts one by one into the embedded model: who holds, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchkit.bench.records import Result
from patchkit.bench.run import run_bench
from patchkit.model.loading import ModelChoice

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = ("alphaedit", "memit", "rome", "mose-right")
pytestmark = pytest.mark.slow
# The published form, with one text before the prompt: enough for plain rewordings, and a third of the time.
SETTINGS = ("prompts=contexts", "contexts=1")


@pytest.fixture(scope="module")
def after_fifty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Each method's row."""
    out = tmp_path_factory.mktemp("bench") / "out"
    model = ModelChoice(str(EXAMPLES / "factworld"), "cpu", "float32")
    found = run_bench(
        str(EXAMPLES / "world.jsonl"), model, out, methods=METHODS, edits=50, overrides=SETTINGS, quick=True
    )
    assert not found.stopped
    return {row.method: row for row in found.rows if row.edits == 50}


def test_alphaedit_holds_fifty_facts(after_fifty: dict[str, Result]) -> None:
    row = after_fifty["alphaedit"]
    assert (row.efficacy.exact or 0) >= 0.95
    assert (row.generalization.success or 0) >= 0.90
    assert (row.locality.unchanged or 0) >= 0.75
    assert row.perplexity is not None
    assert row.perplexity.ratio <= 1.06


def test_it_is_ahead_of_the_others(after_fifty: dict[str, Result]) -> None:
    """As on SmolLM2 (docs/sequential.md). The others are no further apart here than chance would have them."""
    scores = {method: row.score or 0 for method, row in after_fifty.items()}
    assert scores.pop("alphaedit") > max(scores.values())


def test_additive_edits_grow_weights_and_rotations_do_not(after_fifty: dict[str, Result]) -> None:
    growth = {method: row.norm_change or 0 for method, row in after_fifty.items()}
    assert growth["rome"] > growth["memit"] > 0.1
    assert growth["alphaedit"] > 0.1
    assert growth["mose-right"] <= 1e-5
    assert (after_fifty["mose-right"].condition_change or 0) <= 1e-5
