"""A fact that does not hold says why, and what to try."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from patchkit.evaluate.report import Asked, FactReport, Report, Why
from patchkit.model.arch import inspect_model
from patchkit.patch.failures import with_reasons
from patchkit.patch.patch import Patch
from tests import zoo
from tests.helpers import Command, edited_fact, random_patch

MODEL = zoo.FAMILIES["llama"]()
WEIGHT = "model.layers.1.mlp.down_proj.weight"


def patch_of(*facts: Any, keys: list[list[float]] | None = None) -> Patch:
    """Facts of one batch at one site, with keys that begin as given."""
    made = random_patch(MODEL, "base", facts, ranks={1: len(facts)})
    if keys:
        made.state[f"{WEIGHT}.keys"][:] = 0
        made.state[f"{WEIGHT}.keys"][: len(keys[0])] = torch.tensor(keys).T
    return made


def measured(fact_id: str = "f1", exact: bool = False, answered: bool = False) -> FactReport:
    rates = {"success": None, "exact": float(exact), "generated": float(exact)}
    asked = Asked(question="Which city?", prompted=False, before="x", after="y", holds=answered)
    usual: dict[str, Any] = {"id": fact_id, "prompt": "the city of", "target_new": "Rome", "target_true": None}
    usual |= {"says_before": "x", "says_after": "y", "probability_before": 0.1, "probability_after": 0.2}
    locality = {"success": None, "unchanged": None}
    return FactReport.model_validate(
        {**usual, "efficacy": rates, "generalization": rates, "locality": locality, "asked": asked}
    )


def why(patch: Patch, found: FactReport) -> Why | None:
    nothing: dict[str, Any] = {"success": None, "exact": None, "generated": None}
    report = Report.model_validate(
        {
            **{"facts": 1, "efficacy": nothing, "generalization": nothing, "perplexity": None, "per_fact": (found,)},
            "locality": {"success": None, "unchanged": None},
        }
    )
    return with_reasons(report, patch, patch.sites(inspect_model(MODEL), force=True)).per_fact[0].why


def test_a_value_that_was_never_found() -> None:
    found = why(patch_of(edited_fact(target_loss=3.0, steps=25)), measured())
    assert found is not None
    assert (found.kind, found.by) == ("never learned", None)
    assert found.because == "never learned: after 25 steps its target's tokens have a mean probability of 5%"
    assert "value.steps" in found.advice


@pytest.mark.parametrize(
    ("method", "setting"), [("ultraedit", "--set sweeps=N"), ("ft", "--set bound=X"), ("not-here", "value.steps")]
)
def test_what_to_try_are_settings_of_the_method(method: str, setting: str) -> None:
    fact = edited_fact(target_loss=3.0)
    found = why(random_patch(MODEL, "base", [fact], ranks={1: 1}, method=method), measured())
    assert found is not None
    assert setting in found.advice


def test_a_prompt_that_is_completed_and_a_question_that_is_not_answered() -> None:
    found = why(patch_of(edited_fact()), measured(exact=True))
    assert found is not None
    assert found.kind == "not in other words"
    assert "rewordings" in found.advice


@pytest.mark.parametrize(
    ("other", "keys", "kind", "because"),
    [
        ({"subject": "Roma"}, [[1.0, 0.0], [0.8, 0.6]], "broken", 'by fact f2 ("Roma": keys with a cosine of 0.80)'),
        ({"subject": "city"}, [[1.0, 0.0], [0.0, 1.0]], "broken", 'by fact f2 ("city": the same subject)'),
        ({"subject": "Roma"}, [[1.0, 0.0], [0.0, 1.0]], "lost", "lost among the 1 other fact written with it or later"),
    ],
    ids=["key", "subject", "solve"],
)
def test_a_fact_that_another_one_broke(other: dict[str, str], keys: list[list[float]], kind: str, because: str) -> None:
    facts = edited_fact(), edited_fact(id="f2", prompt="Roma is", **other)
    found = why(patch_of(*facts, keys=keys), measured())
    assert found is not None
    assert found.kind == kind
    assert because in found.because
    assert found.by == ("f2" if kind == "broken" else None)


def test_what_was_written_before_has_not_broken_anything() -> None:
    facts = edited_fact(batch=1), edited_fact(id="f2", prompt="Roma is", subject="city", batch=0)
    found = why(patch_of(facts[1], facts[0]), measured())
    assert found is not None
    assert (found.kind, found.because) == ("lost", "learned, but not kept")
    assert found.advice.startswith("try more layers")  # it was alone in its batch: none is smaller


def test_smaller_batches_are_proposed_where_there_were_others_in_one() -> None:
    facts = edited_fact(), edited_fact(id="f2", prompt="Ada is", subject="Ada")
    found = why(patch_of(*facts), measured())
    assert found is not None
    assert found.advice.startswith("try a smaller --batch-size, more layers")


def test_a_fact_that_holds_or_is_not_in_the_patch_has_no_reason() -> None:
    assert why(patch_of(edited_fact()), measured(exact=True, answered=True)) is None
    assert why(patch_of(edited_fact()), measured("other")) is None


def test_verify_tells_it_in_its_table_and_its_json(run: Command, tmp_path: Path) -> None:
    base = zoo.save(MODEL, zoo.tiny_tokenizer(), tmp_path / "model")
    random_patch(MODEL, str(base), [edited_fact(id="rome", target_loss=3.0)], ranks={1: 1}).save(tmp_path / "patch")
    shown = run("verify", "--quick", tmp_path / "patch")
    assert "✗ rome (city -> Rome): never learned: after 3 steps" in " ".join(shown.out.split())
    (fact,) = run("verify", "--quick", tmp_path / "patch", "--json").json()["per_fact"]
    assert fact["why"]["kind"] == "never learned"
    assert fact["why"]["advice"].startswith("try more steps")


def test_the_json_of_verify_has_every_paraphrase_and_neighbor_as_both_models_say_it(
    run: Command, tmp_path: Path
) -> None:
    base = zoo.save(MODEL, zoo.tiny_tokenizer(), tmp_path / "model")
    near = {"prompt": "the house of", "target": "Ada"}
    fact = edited_fact(paraphrases=("a city named", "the town of"), locality=[near], questions=("Which city?",))
    random_patch(MODEL, str(base), [fact], ranks={1: 1}, size=5.0).save(tmp_path / "patch")
    (found,) = run("verify", tmp_path / "patch", "--json").json()["per_fact"]
    assert [each["prompt"] for each in found["paraphrases"]] == ["a city named", "the town of"]
    assert all(each["before"] != each["after"] for each in found["paraphrases"])
    (neighbor,) = found["neighbors"]
    assert (neighbor["prompt"], neighbor["target"]) == ("the house of", "Ada")
    assert neighbor["unchanged"] == (neighbor["before"] == neighbor["after"])
    assert {"Which city?"} <= {each["question"] for each in found["more"]["in_use"]["asked"]}
    assert all({"before", "after"} <= each.keys() for each in found["more"]["in_use"]["asked"])


def test_long_facts_keep_tables_short_and_ids_whole(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = edited_fact(id="a-rather-long-name-2026", prompt="The city of " + "and so on " * 200, target_new="x " * 500)
    random_patch(MODEL, "base", [long], ranks={1: 1}).save(tmp_path / "patch")
    for width, most in (("40", 60), ("80", 20)):
        monkeypatch.setenv("COLUMNS", width)
        shown = run("show", tmp_path / "patch").out
        assert "a-rather-long-name-2026" in shown
        assert len(shown.splitlines()) <= most
        assert max(map(len, run("log", tmp_path / "patch").out.splitlines())) < 400
    monkeypatch.delenv("COLUMNS")  # a pipe: a row is a line, for grep
    (row,) = [line for line in run("show", tmp_path / "patch").out.splitlines() if "a-rather-long-name-2026" in line]
    assert all(part in row for part in ("The city of", "x x x", "not measured"))
